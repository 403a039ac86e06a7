"""Files of other systems, made by their descriptions: Lipsum-FT's msgpack, wise-ft's pickles, OpenAI's archives."""

import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import msgpack
import open_clip
import torch

HALF = ("attn.in_proj_weight", "attn.in_proj_bias", "visual.proj", "text_projection", "conv1.weight")
HALF_LAYERS = ("out_proj", "c_fc", "c_proj")


def pack(tree: Any) -> bytes:
    """Flax's serialization of a tree of arrays, by its description."""

    def array(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(value.dtype).removeprefix("torch.")
            content = value.contiguous().view(torch.uint8 if value.ndim else value.dtype).numpy().tobytes()
            return msgpack.ExtType(1, msgpack.packb((list(value.shape), name, content)))
        raise TypeError(type(value))

    return msgpack.packb(tree, default=array)


def flax_layer(state: Any, name: str) -> dict[str, torch.Tensor]:
    """A linear layer: kernel (in, out)."""
    return {"kernel": state[f"{name}.weight"].T.contiguous(), "bias": state[f"{name}.bias"]}


def norm(state: Any, name: str) -> dict[str, torch.Tensor]:
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def flax_vision(state: Any, n_layers: int = 2) -> dict[str, Any]:
    """The vision tower as FlaxCLIPVisionModel holds it, written out from open_clip's tensors."""
    layers = {}
    for number in range(n_layers):
        block = f"visual.transformer.resblocks.{number}"
        weights, biases = (state[f"{block}.attn.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
        attention = {
            f"{part}_proj": {"kernel": weight.T.contiguous(), "bias": bias}
            for part, weight, bias in zip("qkv", weights, biases, strict=True)
        }
        layers[str(number)] = {
            "self_attn": {**attention, "out_proj": flax_layer(state, f"{block}.attn.out_proj")},
            "layer_norm1": norm(state, f"{block}.ln_1"),
            "mlp": {"fc1": flax_layer(state, f"{block}.mlp.c_fc"), "fc2": flax_layer(state, f"{block}.mlp.c_proj")},
            "layer_norm2": norm(state, f"{block}.ln_2"),
        }
    return {
        "embeddings": {
            "class_embedding": state["visual.class_embedding"],
            "patch_embedding": {"kernel": state["visual.conv1.weight"].permute(2, 3, 1, 0).contiguous()},
            "position_embedding": {"embedding": state["visual.positional_embedding"]},
        },
        "pre_layrnorm": norm(state, "visual.ln_pre"),
        "encoder": {"layers": layers},
        "post_layernorm": norm(state, "visual.ln_post"),
    }


def write_ckpt(path: Path, state: Any, *, nested: bool = False) -> torch.Tensor:
    """A best_acc.ckpt of a model; returns its cls (D, C)."""
    cls = torch.nn.functional.normalize(torch.randn(24, 5, generator=torch.Generator().manual_seed(2)), dim=0)
    projection = {"kernel": state["visual.proj"]} if nested else state["visual.proj"]
    extractor = {
        "vision_model": flax_vision(state),
        "visual_projection": projection,
        "logit_scale": state["logit_scale"],
    }
    path.write_bytes(pack({"cls": cls, "ext": extractor}))
    return cls


def shell(module: torch.nn.Module, gone: types.ModuleType) -> torch.nn.Module:
    """A module with the same tensors, whose classes are of `gone` where they are not torch's."""
    kind, fields = type(module), dict(vars(module))
    if not kind.__module__.startswith("torch."):
        if not hasattr(gone, kind.__name__):
            setattr(gone, kind.__name__, type(kind.__name__, (torch.nn.Module,), {"__module__": gone.__name__}))
        kind, fields = getattr(gone, kind.__name__), {name: fields[name] for name in vars(torch.nn.Module())}
    made = kind.__new__(kind)
    vars(made).update(fields)
    made._modules = {name: child and shell(child, gone) for name, child in module._modules.items()}
    return made


def pickled_classifier(path: Path, model: torch.nn.Module, *, plain: bool = False) -> torch.nn.Linear:
    """What wise-ft saves: a module of classes that are not installed here."""
    gone = types.ModuleType("src_models_modeling")
    for name in ("ImageClassifier", "ImageEncoder"):
        setattr(gone, name, type(name, (torch.nn.Module,), {"__module__": gone.__name__}))
    sys.modules[gone.__name__] = gone
    try:
        encoder, whole = gone.ImageEncoder(), gone.ImageClassifier()
        encoder.model = shell(model, gone)
        encoder.preprocess = print
        whole.image_encoder, whole.classification_head = encoder, torch.nn.Linear(24, 5)
        whole.process_images = True
        if plain:
            path.write_bytes(pickle.dumps(whole))
        else:
            torch.save(whole, path)
    finally:
        del sys.modules[gone.__name__]
    return whole.classification_head


def openai_archive(path: Path, model: torch.nn.Module, *, extras: bool = True) -> dict[str, torch.Tensor]:
    """A model as OpenAI published its own: a TorchScript archive of both towers, linear layers in float16.

    Returns the weights that are in it, in float32.
    """
    if extras:
        for name, value in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 49408)):
            vars(model).pop(name, None)
            model.register_buffer(name, torch.tensor(value))
    inputs = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 16, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop TorchScript
        traced = torch.jit.trace_module(model.eval(), inputs, check_trace=False)
        for name, value in traced.named_parameters():
            stem = name.removesuffix(".weight").removesuffix(".bias")
            if name.endswith(HALF) or stem.endswith(HALF_LAYERS):
                value.data = value.data.half()
        torch.jit.save(traced, str(path))
    return {name: value.detach().float() for name, value in traced.named_parameters()}


def known_architecture(monkeypatch: Any, name: str, config: dict[str, Any]) -> None:
    """Make a configuration one of open_clip's architectures."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
