# %% [markdown]
# # Between zero-shot and fitted: interpolation under shift
#
# A head fitted on clean digits loses accuracy on shifted ones. Interpolating its weights with those of the zero-shot
# head (as in WiSE-FT) keeps most of the accuracy on both.

# %%
import featcache
import heads

SHIFTS = ("sketch", "inverted", "noisy")
train, val, test = (featcache.encode("digits", split) for split in ("train", "val", "test"))
shifted = [featcache.encode(f"digits:{shift}", "test") for shift in SHIFTS]
texts = featcache.embed_text(train.classnames, ['a photo of the number: "{}".'], model="tiny", name="digits")
zero_shot, ridge = heads.ZeroShot().fit(texts), heads.Ridge().fit(train)

# %% [markdown]
# All eleven heads cost two matrix products per data set.

# %%
path = heads.interpolate(zero_shot, ridge, [alpha / 10 for alpha in range(11)])
rows = heads.evaluate(path, [test, *shifted])
for row in rows:
    mean = sum(row[f"digits-{shift}:top1"] for shift in SHIFTS) / len(SHIFTS)
    print(f"alpha {row['alpha']:.1f}: clean {row['digits:top1']:.3f}, shifted {mean:.3f}")

# %% [markdown]
# The coefficient is chosen on the validation split, never on a split that is reported; `choose` records that.

# %%
best = heads.choose(path, val)
print(best)
