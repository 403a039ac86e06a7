"""OpenAI's names of its models, which wise-ft and others use, and open_clip's names of them.

The models were trained with QuickGELU, for which open_clip has separate architecture names.
"""

OPENAI = "openai"
"""open_clip's tag of the weights."""

QUICK = {
    **{name: f"{name}-quickgelu" for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")},
    **{f"ViT-{size}": f"ViT-{size.replace('/', '-')}-quickgelu" for size in ("B/32", "B/16", "L/14")},
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}
"""OpenAI's name -> open_clip's architecture."""


def open_clip_name(model: str, pretrained: str | None = None) -> tuple[str, str | None]:
    """open_clip's architecture and tag for OpenAI's model names; other names unchanged.

    ``ViT-B/32`` is always OpenAI's architecture, with OpenAI's weights by default. ``RN50`` and the like are also
    open_clip's architectures, and are left unchanged if other weights are given.

    >>> open_clip_name("ViT-L/14@336px"), open_clip_name("RN50")
    (('ViT-L-14-336-quickgelu', 'openai'), ('RN50-quickgelu', 'openai'))
    >>> open_clip_name("ViT-B/32", "mine.pt"), open_clip_name("RN50", "cc12m")
    (('ViT-B-32-quickgelu', 'mine.pt'), ('RN50', 'cc12m'))
    """
    if model in QUICK and ("/" in model or pretrained in (None, OPENAI)):
        return QUICK[model], pretrained or OPENAI
    return model, pretrained
