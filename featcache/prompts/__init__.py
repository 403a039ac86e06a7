"""Inputs of the text tower: class names, templates, prompt files; and class subsets.

Class names may repeat: two ImageNet names occur twice. They are inserted into templates unchanged: DomainNet's keep
their underscores and capitals, and replacing these changes the zero-shot numbers.

>>> fill(load_templates("simple"), ["cat", "The_Eiffel_Tower"])
[['a photo of a cat.'], ['a photo of a The_Eiffel_Tower.']]
"""

from featcache.prompts.class_lists import ClassList, class_list_names, load_class_list, load_classnames
from featcache.prompts.imagenet import load_subset, subset_names
from featcache.prompts.objectnet import ObjectNet, load_objectnet
from featcache.prompts.prompt_files import load_prompt_file, prompts_of
from featcache.prompts.templates import fill, load_templates, template_names

__all__ = [
    "ClassList",
    "ObjectNet",
    "class_list_names",
    "fill",
    "load_class_list",
    "load_classnames",
    "load_objectnet",
    "load_prompt_file",
    "load_subset",
    "load_templates",
    "prompts_of",
    "subset_names",
    "template_names",
]
