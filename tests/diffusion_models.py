"""A small random Stable Diffusion model on disk, made with diffusers, and a stand-in that draws flat pictures."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from featcache.encoding.options import Share
from ft.generation import GenerateOptions, generate

TOKENS = 40  # the longest prompt, in characters and two


def write_diffusion_model(folder: Path, seed: int = 0, safe: bool = True) -> str:
    """Save a pipeline that draws pictures whose sides are multiples of 8."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    files = folder.with_name(f"{folder.name}-vocabulary")
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = {"vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer, "unet": unet}
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts, scheduler=scheduler, **checker)
    pipeline.save_pretrained(folder, safe_serialization=safe)
    return str(folder)


class Draft:
    """Draws flat pictures whose colour gives the seed; counts them, and can be slow."""

    def __init__(self, seconds: float = 0.0, precision: str = "fp32") -> None:
        self.seconds, self.drawn = seconds, 0
        self.identity = {"model": {"name": "draft"}, "precision": precision}

    def check(self, prompts: Sequence[str], height: int, width: int) -> None:
        pass

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int, **how: Any
    ) -> list[Image.Image]:
        time.sleep(self.seconds * len(prompts))
        how["each_step"]()
        self.drawn += len(prompts)
        return [Image.new("RGB", (width, height), tuple((seed >> 8 * i) % 256 for i in range(3))) for seed in seeds]


def draft(out: Path, painter: Draft | None = None, share: Share | None = None, **changes: Any) -> Any:
    options = GenerateOptions(**({"images": 3, "size": 8, "height": 8, "width": 8, "batch_size": 4} | changes))
    return generate(
        [("owl", "owl"), ("ant", "ant")], ["a {}.", "an old {}."], painter or Draft(), out, options=options, share=share
    )
