"""Training images from a text-to-image diffusion model: prompts filled with class names, as in stage 1 of RegFT.

RegFT (Park et al., arXiv:2406.05432) fine-tunes CLIP on images that Stable Diffusion generates for each class name,
without any real image. `generate` writes them into class folders, ``OUT/SPLIT/<class>/<prompt>_<image>.png``, which
``imagefolder:OUT`` reads (or ``imagenet:OUT``, if the folders are WordNet ids).

>>> from ft.generation.styles import load_style
>>> load_style("dtd").templates
('a photo of a {} texture.',)
"""

from ft.generation.draw import GenerateOptions, GenerateResult, generate
from ft.generation.styles import Style, load_style

__all__ = ["GenerateOptions", "GenerateResult", "Style", "generate", "load_style"]
