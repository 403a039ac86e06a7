"""Training images from a text-to-image diffusion model: class names times prompts, as stage 1 of RegFT makes them.

RegFT (Park et al., arXiv:2406.05432) fine-tunes CLIP on images that Stable Diffusion drew of each class name, without a
single real image. `generate` draws them into a tree of class folders, ``OUT/SPLIT/<class>/<prompt>_<image>.png``, which
``imagefolder:OUT`` (or ``imagenet:OUT``, where the folders are WordNet ids) reads.

>>> from ft.generation.styles import load_style
>>> load_style("dtd").templates
('a photo of a {} texture.',)
"""

from ft.generation.draw import GenerateOptions, GenerateResult, generate
from ft.generation.styles import Style, load_style

__all__ = ["GenerateOptions", "GenerateResult", "Style", "generate", "load_style"]
