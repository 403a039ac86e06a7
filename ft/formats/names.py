"""Names and shapes of CLIP's tensors: open_clip's (OpenAI's own) and Hugging Face's.

Both hold the same numbers. Hugging Face keeps query, key and value apart, where open_clip stacks them, and stores both
projections transposed, as weights of linear layers.
"""

import re
from collections.abc import Iterator

import torch

from featcache.errors import EncoderError
from ft.state import State

__all__ = ["from_huggingface", "to_huggingface"]

LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
TOWERS = {"visual.transformer.resblocks.": "vision_model.", "transformer.resblocks.": "text_model."}
PARTS = ("q_proj", "k_proj", "v_proj")


def to_huggingface(state: State) -> dict[str, torch.Tensor]:
    """A state dict of open_clip's CLIP (ViT, class token) under the names of `transformers.CLIPModel`.

    Raises
    ------
    EncoderError
        A tensor that CLIPModel has no place for.
    """
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key in WHOLE:
            renamed[WHOLE[key]] = value
        elif key in TRANSPOSED:
            renamed[TRANSPOSED[key]] = value.T
        elif key != "attn_mask":
            renamed.update(_layer_to_huggingface(key, value))
    return renamed


def _layer_to_huggingface(key: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    match = re.fullmatch(r"(visual\.transformer\.resblocks\.|transformer\.resblocks\.)(\d+)\.(.+)", key)
    if match is None:
        raise EncoderError(f"{key}: Hugging Face's CLIPModel has no such tensor; it takes ViTs with a class token only")
    place, rest = f"{TOWERS[match[1]]}encoder.layers.{match[2]}", match[3]
    if rest.startswith("attn.in_proj_"):
        for part, piece in zip(PARTS, value.chunk(3), strict=True):
            yield f"{place}.self_attn.{part}.{rest.removeprefix('attn.in_proj_')}", piece
        return
    stem, _, kind = rest.rpartition(".")
    if stem not in LAYER:
        raise EncoderError(f"{key}: Hugging Face's CLIPModel has no such tensor; it takes ViTs with a class token only")
    yield f"{place}.{LAYER[stem]}.{kind}", value


def from_huggingface(state: State) -> dict[str, torch.Tensor]:
    """The inverse of `to_huggingface`, of a whole model or of one tower.

    Raises
    ------
    EncoderError
        A tensor that is none of CLIPModel's, or a layer without query, key or value.
    """
    back = {name: key for key, name in WHOLE.items()}
    transposed = {name: key for key, name in TRANSPOSED.items()}
    renamed: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        if name.endswith("position_ids"):  # counts 0, 1, ...; stored by old versions
            continue
        if name in back:
            renamed[back[name]] = value
        elif name in transposed:
            renamed[transposed[name]] = value.T
        else:
            _layer_from_huggingface(name, value, renamed, stacks)
    for key, parts in stacks.items():
        if missing := [part for part in PARTS if part not in parts]:
            raise EncoderError(f"{key}: lacks {', '.join(missing)}; the checkpoint is not whole")
        renamed[key] = torch.cat([parts[part] for part in PARTS])
    return renamed


def _layer_from_huggingface(
    name: str, value: torch.Tensor, renamed: dict[str, torch.Tensor], stacks: dict[str, dict[str, torch.Tensor]]
) -> None:
    match = re.fullmatch(r"(vision_model\.|text_model\.)encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    stems = {there: here for here, there in LAYER.items()}
    if match is not None:
        tower = next(here for here, there in TOWERS.items() if there == match[1])
        place, rest, kind = f"{tower}{match[2]}", match[3], match[4]
        part = rest.removeprefix("self_attn.")
        if part in PARTS:
            stacks.setdefault(f"{place}.attn.in_proj_{kind}", {})[part] = value
            return
        if rest in stems:
            renamed[f"{place}.{stems[rest]}.{kind}"] = value
            return
    raise EncoderError(f"{name}: no tensor of Hugging Face's CLIPModel; expected its names")
