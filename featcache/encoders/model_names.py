"""OpenAI's names of its models, as wise-ft and many others write them, and what open_clip calls these models.

They were trained with QuickGELU, which open_clip has under names of their own.
"""

OPENAI = "openai"
"""open_clip's tag of their weights."""

QUICK = {
    **{name: f"{name}-quickgelu" for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")},
    **{f"ViT-{size}": f"ViT-{size.replace('/', '-')}-quickgelu" for size in ("B/32", "B/16", "L/14")},
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}
"""OpenAI's name -> open_clip's architecture."""


def open_clip_name(model: str, pretrained: str | None = None) -> tuple[str, str | None]:
    """Architecture and weights for open_clip, where a model has OpenAI's name; other names as they are.

    ``ViT-B/32`` always is the architecture that OpenAI trained, with its weights unless others are given. ``RN50`` and
    the like are also architectures of open_clip: with other weights they stay what they are.

    Examples
    --------
    >>> open_clip_name("ViT-L/14@336px"), open_clip_name("RN50")
    (('ViT-L-14-336-quickgelu', 'openai'), ('RN50-quickgelu', 'openai'))
    >>> open_clip_name("ViT-B/32", "mine.pt"), open_clip_name("RN50", "cc12m")
    (('ViT-B-32-quickgelu', 'mine.pt'), ('RN50', 'cc12m'))
    """
    if model not in QUICK:
        return model, pretrained
    if "/" in model or pretrained in (None, OPENAI):
        return QUICK[model], pretrained or OPENAI
    return model, pretrained
