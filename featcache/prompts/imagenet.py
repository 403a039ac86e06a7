"""ImageNet's class names, WordNet ids and prompt templates, from the libraries that ship them."""


def imagenet_classnames() -> list[str]:
    """The 1,000 ImageNet class names of open_clip, in label order (two names occur twice)."""
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)


def openai_imagenet_templates() -> list[str]:
    """OpenAI's 80 ImageNet templates, with ``{}`` for the class name."""
    import open_clip

    return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def imagenet_synsets() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in label order, from timm."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo().label_names())  # type: ignore[no-untyped-call]
