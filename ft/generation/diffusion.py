"""A text-to-image pipeline that draws prompts from seeds; the only module that imports diffusers."""

import re
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from featcache.datasets.hub import hub_lacks, no_hub
from featcache.errors import EncoderError, FeatcacheError, MissingExtraError, PromptError
from featcache.store.key import Json

EXPECTED = (
    "expected a folder saved by diffusers (with model_index.json and safetensors), or a text-to-image model's name "
    "on the hub, owner/name"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Painter:
    """A diffusion pipeline from a folder saved by diffusers or the Hugging Face hub, with weights in safetensors.

    `identity` is the precision (``fp32``, ``bf16`` or ``fp16``), and the digest of the model's files or its name on the
    hub. Raises MissingExtraError if diffusers is not installed; EncoderError if the model does not exist, cannot be
    loaded, or is not a text-to-image model.
    """

    def __init__(self, model: str, revision: str | None, device: str, precision: str) -> None:
        folder = Path(model).expanduser()
        if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
            raise EncoderError(f"--model {model}: no such folder; {EXPECTED}")
        if find_spec("diffusers") and not folder.is_dir() and hub_lacks(model):  # the import takes seconds
            raise no_hub(f"--model {model}", "connect this machine, or give a folder that diffusers saved")
        try:
            import diffusers
            import transformers
        except ImportError as error:
            raise MissingExtraError("generate needs diffusers: pip install 'featcache[generate]'") from error
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        place = str(folder) if folder.is_dir() else model
        load: Any = diffusers.AutoPipelineForText2Image.from_pretrained
        try:
            pipeline = load(
                place,
                revision=revision,
                dtype=DTYPES[precision],
                use_safetensors=True,
                safety_checker=None,  # it would replace images by black ones
                requires_safety_checker=False,
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EncoderError(f"--model {model}: {str(error).splitlines()[0]}; {EXPECTED}") from error
        source = {"files": _digest(folder)} if folder.is_dir() else {"name": model, "revision": revision}
        self.identity: Json = {"model": source, "precision": precision}
        self._pipeline: Any = pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)

    def check(self, prompts: Sequence[str], height: int, width: int) -> None:
        """Refuse prompts and sizes that the model does not support.

        Raises PromptError if the tokenizer would truncate a prompt; FeatcacheError if the size is not a multiple of 8,
        or of the VAE's scale factor.
        """
        unit = max(8, getattr(self._pipeline, "vae_scale_factor", 8))
        if height % unit or width % unit:
            raise FeatcacheError(f"height {height}, width {width}: expected multiples of {unit}")
        tokenizer = getattr(self._pipeline, "tokenizer", None)
        most = getattr(tokenizer, "model_max_length", None)
        if tokenizer is None or most is None:
            return
        for prompt, tokens in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
            if len(tokens) > most:
                raise PromptError(f"{prompt!r} has {len(tokens)} tokens, the model reads {most}; shorten it")

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        height: int,
        width: int,
        *,
        steps: int,
        guidance_scale: float,
        each_step: Callable[[], None],
    ) -> list[Any]:
        """Draw one PIL image per prompt; FeatcacheError if the pipeline cannot draw with these options.

        The initial noise of each image comes from a separate generator on the CPU, so that it is the same on every
        device and in every batch.

        Parameters
        ----------
        prompts, seeds : N of each
        height, width : pixels
        steps : denoising steps
        guidance_scale : weight of classifier-free guidance (Ho and Salimans, arXiv:2207.12598)
        each_step : called after every denoising step
        """

        def after(_pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
            each_step()
            return values

        try:
            drawn = self._pipeline(
                list(prompts),
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=after,
            )
        except ValueError as error:
            raise FeatcacheError(f"the model refuses: {str(error).splitlines()[0]}") from error
        return list(drawn.images)


def _digest(folder: Path) -> str:
    """Digest (sha256, 128 bits) of names and contents of the files that diffusers may read."""
    digest = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".safetensors")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:32]
