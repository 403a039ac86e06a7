"""Templates, class names, prompt files and class subsets."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import PromptError
from featcache.prompts import (
    fill,
    load_classnames,
    load_prompt_file,
    load_subset,
    load_templates,
    prompts_of,
    subset_names,
    template_names,
)


@pytest.mark.parametrize("name", [n for n in template_names() if n != "openai-imagenet"])
def test_named_templates_can_be_filled(name):
    templates = load_templates(name)
    assert len(set(templates)) == len(templates)
    assert all("zero" in prompt for prompt in fill(templates, ["zero"])[0])


def test_the_published_prompts():
    assert fill(load_templates("clip-example"), ["seven"]) == [['a photo of the number: "seven".']]
    assert fill(load_templates("picture"), ["alarm_clock"]) == [["a picture of a alarm_clock"]]
    assert len(load_templates("digits")) == 8


def test_openai_templates_and_imagenet_names_come_from_open_clip():
    templates, names = load_templates("openai-imagenet"), load_classnames("imagenet")
    assert (len(templates), len(names), len(set(names))) == (80, 1000, 998)
    prompts = fill(templates, names)
    assert prompts[0][0] == "a bad photo of a tench."
    assert [i for i, name in enumerate(names) if name == "missile"] == [657, 744]


def test_names_are_inserted_unchanged():
    names = ["The_Eiffel_Tower", "t-shirt", "t-shirt", r"back\1slash", "{}", "{c}"]
    assert [row[0] for row in fill(["a {}"], names)] == [f"a {name}" for name in names]
    assert fill(["{} and {c}"], ["{c}"]) == [["{c} and {c}"]]
    assert fill(["a {}"], ["ice_cream"], replace_underscores=True) == [["a ice cream"]]


@pytest.mark.parametrize("template", ["no place", "{name}", "{0}", "{} {", "}{}", "", "{ }"])
def test_templates_without_a_place_for_the_name(template):
    with pytest.raises(PromptError, match=r"\{\} or \{c\}"):
        fill([template], ["cat"])


def test_no_templates_or_no_class_names_is_refused():
    with pytest.raises(PromptError, match="0 templates and 1 class names"):
        fill([], ["cat"])
    with pytest.raises(PromptError, match="1 templates and 0 class names"):
        fill(["{}"], [])


def test_template_files(tmp_path):
    text, data = tmp_path / "t.txt", tmp_path / "t.json"
    text.write_text("# mine\n\na {}.\nthe {c} – größer\n", encoding="utf-8")
    data.write_text('["a {}.", "the {c} – größer"]', encoding="utf-8")
    assert load_templates(text) == load_templates(str(data)) == ("a {}.", "the {c} – größer")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "a {}.\nno place\n", r"t\.txt:2: got 'no place'"),
        ("t.txt", "# nothing\n", "no template"),
        ("t.json", "[]", "no template"),
        ("t.json", '["a {}", 7]', r"t\.json:entry 2: got 7"),
        ("t.json", "{", "expected a list of templates"),
        ("t.json", "7", "expected a list of templates"),
    ],
)
def test_template_file_errors(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=message):
        load_templates(tmp_path / name)


def test_a_single_template_unless_a_file_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_templates("a photo of a {}.") == ("a photo of a {}.",)
    assert load_templates("{a}, from above") == ("{a}, from above",)
    (tmp_path / "my {}.txt").write_text("the {}\n")
    assert load_templates("my {}.txt") == ("the {}",)


def test_unknown_templates_list_the_known_ones():
    with pytest.raises(
        PromptError, match="bare, clip-example, digits, fmow, iwildcam, openai-imagenet, picture, simple"
    ):
        load_templates("simpel")


def test_classnames_of_a_file(tmp_path):
    (tmp_path / "classes.txt").write_text("missile\nn01440764\ttench\nmissile\n")
    assert load_classnames(tmp_path / "classes.txt") == ("missile", "tench", "missile")
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(PromptError, match="no class name"):
        load_classnames(tmp_path / "classes.txt")
    with pytest.raises(PromptError, match="no such file"):
        load_classnames(tmp_path / "none.txt")


def test_prompt_file(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"tree frog": ["green", "small"], "owl": ["It flies."]}), encoding="utf-8")
    prompts = load_prompt_file(path)
    assert list(prompts) == ["tree frog", "owl"]
    assert prompts_of(prompts, ["owl", "tree_frog", "owl"]) == [["It flies."], ["green", "small"], ["It flies."]]
    assert prompts_of({"tree_frog": ["green"]}, ["tree frog"]) == [["green"]]
    assert prompts_of({"a_b": ["1"], "a b": ["2"]}, ["a b", "a_b"]) == [["2"], ["1"]]


def test_missing_or_ambiguous_prompts_are_refused():
    with pytest.raises(PromptError, match=r"no sentences for 2 of 3 classes: 'b', 'c'; the prompt file has 1"):
        prompts_of({"a": ["x"]}, ["a", "b", "c"])
    with pytest.raises(PromptError, match="keep one"):
        prompts_of({"a_b c": ["1"], "a b_c": ["2"]}, ["a b c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cat": ["x"],\n "dog" ["y"]}', r"p\.json:2: not JSON"),
        ('{"cat": ["x"], "cat": ["y"]}', "class 'cat' occurs twice"),
        ('{"cat": []}', "class 'cat': got \\[\\]"),
        ('{"cat": "x"}', "class 'cat': got 'x'"),
        ('{"cat": {"a": ["x"]}}', "class 'cat': got"),
        ('{"cat": ["x", 7]}', "class 'cat', sentence 2: got 7"),
        ('{"cat": ["x", " "]}', "class 'cat', sentence 2"),
        ('{"cat": ["a photo of {}"]}', "class 'cat', sentence 1: got the template"),
        ('["x"]', "got list"),
        ("{}", "expected"),
        ("[" * 100_000, "not a prompt file"),
    ],
)
def test_prompt_file_errors(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(PromptError, match=message):
        load_prompt_file(tmp_path / "p.json")


def test_a_prompt_file_that_is_missing_or_not_text_is_refused(tmp_path):
    with pytest.raises(PromptError, match=r"p\.json"):
        load_prompt_file(tmp_path / "p.json")
    (tmp_path / "p.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(PromptError, match="not UTF-8"):
        load_prompt_file(tmp_path / "p.json")


@given(
    st.recursive(
        st.none() | st.integers() | st.text("a{} ", max_size=3),
        lambda x: st.lists(x) | st.dictionaries(st.text("ab", max_size=2), x),
        max_leaves=5,
    )
)
def test_any_json_is_a_prompt_file_or_a_clear_error(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    try:
        assert load_prompt_file(path) == value
    except PromptError:
        assert not (
            isinstance(value, dict)
            and value
            and all(isinstance(v, list) and v and all(isinstance(s, str) for s in v) for v in value.values())
            and all(s.strip() and "{}" not in s and "{a}" not in s for v in value.values() for s in v)
        )


def test_imagenet_subsets():
    r, a = load_subset("imagenet-r"), load_subset("imagenet-a")
    assert subset_names() == ["imagenet-a", "imagenet-r"]
    assert (r[:5], r[-4:]) == ((1, 2, 4, 6, 8), (980, 981, 983, 988))
    assert (a[:5], a[-4:]) == ((6, 11, 13, 15, 17), (984, 986, 987, 988))
    for subset in (r, a):
        assert len(subset) == 200
        assert list(subset) == sorted(set(subset))
    assert len(set(r) & set(a)) == 86
    with pytest.raises(PromptError, match="imagenet-a, imagenet-r"):
        load_subset("imagenet-o")


def test_classes_of_subsets():
    names = load_classnames("imagenet")
    assert names[load_subset("imagenet-r")[0]] == "goldfish"
    assert [names[i] for i in load_subset("imagenet-a")[:2]] == ["stingray", "goldfinch"]
