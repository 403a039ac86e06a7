"""SigLIP-shaped models: sigmoid logits with a learned bias and map pooling, against open_clip's own forward pass."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from featcache.encoders import load_encoder
from featcache.encoding.encode import encode
from featcache.encoding.texts import embed_prompts
from featcache.errors import PromptError
from heads import ZeroShot

CLASSES, TEMPLATE = ["cat", "polar bear", "tree frog"], "a photo of a {}."
CONFIG = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "init_logit_scale": 2.3,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 160,
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-06},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**{key: value for key, value in CONFIG.items() if key != "custom_text"})
    with torch.no_grad():
        model.logit_bias.fill_(-12.75)  # learned: not what the configuration began with
        model.logit_scale.fill_(2.5)
    place = tmp_path / "siglip"
    place.mkdir()
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, place / "open_clip_model.safetensors")
    rng = np.random.default_rng(0)
    for split in ("test",):
        for name in CLASSES:
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(
                tmp_path / "pets" / split / name / "1.png"
            )
    return tmp_path


def test_zero_shot_logits_are_open_clips(folder: Path) -> None:
    name = f"local-dir:{folder}/siglip"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)([TEMPLATE.format(label) for label in CLASSES])
    pictures = [Image.open(folder / "pets/test" / label / "1.png").convert("RGB") for label in CLASSES]
    with torch.inference_mode():
        images, texts, scale, bias = model.eval()(torch.stack([transform(p) for p in pictures]), tokens)
        reference = (scale * images @ texts.T + bias).double()
    encoder = load_encoder(name, device="cpu")
    assert encoder.logit_bias == -12.75
    assert encoder.logit_scale == pytest.approx(float(scale))
    store = encode(f"imagefolder:{folder}/pets", "test", encoder)
    head = ZeroShot().fit(embed_prompts(CLASSES, [TEMPLATE], encoder).store)
    logits = head.scores(store.numpy()[0])
    np.testing.assert_allclose(logits, reference, atol=0.02)  # features are stored in float16
    assert np.abs(logits).min() > 0.5
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), torch.sigmoid(reference), rtol=0.02)


def test_the_bias_belongs_to_the_text_side_of_the_key(folder: Path) -> None:
    """A changed bias changes the zero-shot head: another text store, the same image store."""
    before = load_encoder(f"local-dir:{folder}/siglip", device="cpu")
    file = folder / "siglip/open_clip_model.safetensors"
    from safetensors.torch import load_file

    state = load_file(file)
    state["logit_bias"] += 1
    save_file(state, file)
    after = load_encoder(f"local-dir:{folder}/siglip", device="cpu")
    assert after.logit_bias == -11.75
    assert after.image_identity == before.image_identity
    assert after.text_identity != before.text_identity
    assert after.text_digest != before.text_digest


def test_a_text_that_hugging_faces_tokenizer_would_truncate_is_refused(folder: Path) -> None:
    """SigLIP's tokenizers come from transformers, and truncate silently."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["</s>", "<unk>", "<pad>", "a", "photo", "of", "cat", "."]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.save_pretrained(folder / "siglip")
    file = folder / "siglip/open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "beside/the-weights"
    file.write_text(json.dumps(config))
    encoder = load_encoder(f"local-dir:{folder}/siglip", device="cpu")
    assert encoder.text_identity is not None
    assert encoder.text_identity["tokenizer"]["type"] == "HFTokenizer"
    assert np.isfinite(encoder.encode_texts([" ".join(["cat"] * 15), "a photo of a cat ."])).all()  # 15 and </s>: 16
    with pytest.raises(PromptError, match="text of 17 tokens, siglip takes at most 16: 'cat cat"):
        encoder.encode_texts(["a cat", " ".join(["cat"] * 16)])
