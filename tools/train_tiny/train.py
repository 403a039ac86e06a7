"""The training loop: a contrastive loss in which every true image-caption pair of the batch is a positive."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.train_tiny import bpe, model
from tools.train_tiny.captions import corpus
from tools.train_tiny.data import Batch, Source
from tools.train_tiny.glyphs import CHARS, Bank

CORPUS_CAPTIONS, CORPUS_SEED, MERGES = 20_000, 0, 600
MAX_SCALE = math.log(100)


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training run."""

    steps: int = 2400
    batch: int = 128
    lr: float = 1.5e-3
    weight_decay: float = 0.1
    warmup: int = 150
    clip: float = 1.0
    patch_dropout: float = 0.5  # masked patches, as in FLIP (Li et al. 2022): half the tokens, half the time
    easy_until: float = 0.2  # share of the steps over which plain pictures give way to the whole mix
    anchor: float = 0.5  # weight of the character loss below
    whole_from: float = 0.85  # share of the steps after which every patch is seen, as at inference


def contrastive_loss(images: Tensor, texts: Tensor, truth: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross entropy ``()`` of cosine logits against the true pairs, spread evenly over them.

    With only the diagonal true it is CLIP's loss (Radford et al. 2021). A batch holds many pictures of each character;
    CLIP's loss would call most of the true pairs false, so all of them are targets here.

    Parameters
    ----------
    images, texts : L2-normalised features ``(B, D)``
    truth : ``(images B, captions B)`` bool; the diagonal is true
    scale : exponentiated logit scale ``()``

    Examples
    --------
    >>> a, b = torch.eye(4), torch.eye(4).roll(1, 0)
    >>> one = contrastive_loss(a, b, torch.eye(4, dtype=torch.bool), torch.tensor(5.0))
    >>> clip = F.cross_entropy(5 * a @ b.T, torch.arange(4))
    >>> bool(torch.isclose(one, clip))
    True
    """
    logits = scale * images @ texts.T
    target = truth.float()
    by_image = -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_text = -(target / target.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (by_image + by_text) / 2


class Anchors(torch.nn.Module):
    """One prototype a character, shared by both towers and dropped after training.

    Pictures and captions of a character are both pulled to its prototype, so that the towers need not find each other
    by chance first; without it the loss stands still for the first several hundred steps.
    """

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        self.prototypes = torch.nn.Parameter(torch.randn(len(CHARS), dim) * dim**-0.5)
        self.scale = scale

    def forward(self, features: Tensor, chars: Tensor) -> Tensor:
        """Cross entropy ``()`` of cosines with the prototypes, for L2-normalised ``features (B, D)``."""
        return F.cross_entropy(self.scale * features @ F.normalize(self.prototypes, dim=-1).T, chars)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to zero.

    >>> recipe = Recipe(steps=100, warmup=10, lr=1.0)
    >>> [round(learning_rate(s, recipe), 2) for s in (0, 9, 55, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (1 + math.cos(math.pi * progress)) / 2


def optimizer(net: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, norms, the logit scale and other vectors are not decayed."""
    trained = [p for p in net.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def batch_loss(net: CLIP, anchors: Anchors, batch: Batch, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Contrastive and character loss; bfloat16 products, float32 normalisation and losses."""
    pixels = (batch.images - model.MEAN) / model.STD
    # The fused attention kernel is slower than plain products in bfloat16 at this size on a CPU.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        images = net.encode_image(pixels)
        texts = net.encode_text(tokens)
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    contrast = contrastive_loss(images, texts, batch.truth, net.logit_scale.exp())
    return contrast, (anchors(images, batch.chars) + anchors(texts, batch.chars)) / 2


def update(net: CLIP, opt: torch.optim.Optimizer, loss: Tensor, clip: float) -> None:
    """One optimiser step; the logit scale stays at or below 100."""
    opt.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    opt.step()
    with torch.no_grad():
        net.logit_scale.clamp_(0, MAX_SCALE)


def write_vocabulary(folder: Path) -> int:
    """Learn the merges on the caption corpus, write them, and return the vocabulary's size."""
    merges = bpe.learn(corpus(CORPUS_CAPTIONS, CORPUS_SEED), MERGES)
    bpe.write(merges, folder / model.MERGES_FILE)
    return bpe.vocabulary_size(len(merges))


def train(
    bank: Bank, seed: int, folder: Path, recipe: Recipe, watch: Callable[[int, CLIP], None] | None = None
) -> tuple[CLIP, list[float]]:
    """Train on ``bank``, save into ``folder``; returns the model and the loss of each step.

    ``watch(step, net)`` is called now and then; it must leave the random state alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_vocabulary(folder)
    tokenize: open_clip.SimpleTokenizer = model.tokenizer(folder)
    torch.manual_seed(seed)
    net = model.build(vocab_size, recipe.patch_dropout)
    anchors = Anchors(model.EMBED_DIM)
    opt, source = optimizer(torch.nn.ModuleList([net, anchors]), recipe), Source(bank, seed)
    losses: list[float] = []
    start = time.perf_counter()
    net.train()
    for step in range(recipe.steps):
        if step == int(recipe.whole_from * recipe.steps):
            net.visual.patch_dropout.prob = 0.0
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batch = source.batch(recipe.batch, max(0.0, 1 - step / (recipe.easy_until * recipe.steps)))
        contrast, character = batch_loss(net, anchors, batch, tokenize(batch.captions))
        update(net, opt, contrast + recipe.anchor * character, recipe.clip)
        losses.append(contrast.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / 50
            print(f"step {step + 1}/{recipe.steps} loss {recent:.3f} {time.perf_counter() - start:.0f} s", flush=True)
        if watch and (step % 500 == 499 or step + 1 == recipe.steps):
            net.eval()
            watch(step + 1, net)
            net.train()
    net.eval()
    model.save(net, folder, vocab_size)
    return net, losses
