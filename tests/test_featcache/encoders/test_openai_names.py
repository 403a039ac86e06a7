"""OpenAI's model names stand for open_clip's QuickGELU architectures with OpenAI's weights everywhere."""

from pathlib import Path

import open_clip
import pytest
import torch

from featcache.encoders import load_encoder
from featcache.encoders.model_names import QUICK, open_clip_name
from featcache.errors import ActivationMismatchError, EncoderError, FeatcacheError
from featcache.store import find_store
from featcache.store.finding import openai_name
from ft.checkpoints.parents import parent_of

NAMES = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")


def test_every_name_is_an_architecture_that_has_openais_weights() -> None:
    assert tuple(QUICK) == NAMES
    known = open_clip.pretrained.list_pretrained_models_by_tag("openai")
    for name in NAMES:
        model, tag = open_clip_name(name)
        assert (model in known, tag) == (True, "openai")
        assert openai_name(name) == f"{model}/openai"
        config = open_clip.get_model_config(model)
        assert config is not None
        assert config["quick_gelu"]


class Loaded(FeatcacheError):
    """The arguments that open_clip gets, since the weights are on the network."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(model: str, pretrained: str | None = None, **_: object) -> torch.nn.Module:
        raise Loaded(model, pretrained)

    monkeypatch.setattr(open_clip, "create_model", create_model)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("model", "pretrained", "expected"),
    [
        *((name, None, (QUICK[name], "openai")) for name in NAMES),
        ("ViT-B/32", "openai", ("ViT-B-32-quickgelu", "openai")),
        ("RN50", "openai", ("RN50-quickgelu", "openai")),
        ("RN50", "random", ("RN50", None)),
        ("ViT-B/32", "random", ("ViT-B-32-quickgelu", None)),
        ("ViT-B/32", "laion400m_e32", ("ViT-B-32-quickgelu", "laion400m_e32")),
    ],
)
def test_openais_names_load_the_right_model(
    model: str, pretrained: str | None, expected: tuple[str, str | None]
) -> None:
    with pytest.raises(Loaded) as found:
        load_encoder(model, pretrained)
    assert found.value.args == expected


@pytest.mark.usefixtures("asked")
def test_every_command_with_a_model_accepts_them() -> None:
    with pytest.raises(Loaded) as found:
        parent_of("ViT-B/16")
    assert found.value.args == ("ViT-B-16-quickgelu", "openai")
    with pytest.raises(Loaded) as found:  # the base of a conversion: nothing is fetched that may not be needed
        parent_of("ViT-B/16", architecture=True)
    assert found.value.args == ("ViT-B-16-quickgelu", None)
    with pytest.raises(Loaded) as found:
        parent_of("RN50", architecture=True)
    assert found.value.args == ("RN50", None)


@pytest.mark.usefixtures("asked")
def test_open_clips_own_names_keep_their_meaning() -> None:
    with pytest.raises(ActivationMismatchError, match="ViT-B-32-quickgelu"):
        load_encoder("ViT-B-32", "openai")
    with pytest.raises(EncoderError, match="needs weights"):
        load_encoder("ViT-B-32")


def test_openais_names_find_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fakes import NumpyDataset, NumpyEncoder

    from featcache.encoding.images import encode_dataset

    monkeypatch.setattr(NumpyEncoder, "name", "ViT-L-14-336-quickgelu/openai")
    store = encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path).store
    assert find_store("fake/train@ViT-L/14@336px", tmp_path).path == store.path
