# %% [markdown]
# # A linear probe compared with zero-shot
#
# Handwritten digits and the model `tiny` come with featcache. Replace `digits` by your own folder (`imagefolder:DIR`)
# and `tiny` by your model (`ViT-B/32`).

# %%
import featcache
import heads

train, val, test = (featcache.encode("digits", split, model="tiny") for split in ("train", "val", "test"))
texts = featcache.embed_text(train.classnames, ['a photo of the number: "{}".'], model="tiny", name="digits")
print(train)

# %% [markdown]
# Each head is a scikit-learn classifier. Ridge chooses its alpha by exact leave-one-out: no validation split is needed.

# %%
zero_shot, ridge = heads.ZeroShot().fit(texts), heads.Ridge().fit(train)
for head in (zero_shot, ridge):
    print(f"{type(head).__name__}: {head.score(*test.numpy()):.1%}")

# %% [markdown]
# Few-shot: the same head fitted on 1, 4 and 16 rows per class.

# %%
accuracy = {shots: heads.Ridge().fit(heads.few_shot(train, shots=shots)).score(*test.numpy()) for shots in (1, 4, 16)}
print(accuracy)
