"""A torch module as encoder, keyed by weights, code and transform."""

import linecache
import types

import numpy as np
import pytest
import torch
from fakes import NumpyDataset
from torchvision import transforms

from featcache import encode
from featcache.encoders.modules import ModuleEncoder
from featcache.errors import EncoderError
from featcache.store.key import content_key

PLAIN = transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8), transforms.ToTensor()])


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7))


def key(*args, **options):
    return content_key(ModuleEncoder(*args, **options).image_identity)


def test_features_are_those_of_the_module(tmp_path):
    data, net = NumpyDataset(), network()
    store = encode(data, model=net, transform=PLAIN, root=tmp_path)
    pictures = [data.decode(data.read(row), row) for row in range(len(data.index))]
    with torch.inference_mode():
        pixels = torch.stack([PLAIN(transforms.functional.to_pil_image(np.asarray(p))) for p in pictures])
        expected = torch.nn.functional.normalize(net(pixels))
    assert np.allclose(store.features, expected, atol=1e-3)


def test_the_key_follows_what_changes_the_features():
    same = key(network(), PLAIN)
    assert key(network(), transforms.Compose(PLAIN.transforms)) == same
    others = {
        "weights": key(network(1), PLAIN),
        "transform": key(network(), transforms.Compose([transforms.Resize(9), *PLAIN.transforms[1:]])),
        "structure": key(torch.nn.Sequential(*network(), torch.nn.ReLU()), PLAIN),
        "precision": key(network(), PLAIN, precision="bf16"),
        "digest": key(network(), PLAIN, digest="1"),
    }
    assert len({same, *others.values()}) == 6


def written(code, name):
    """A class whose source is available, as if from a file."""
    place = f"<{name}>"
    linecache.cache[place] = (len(code), None, code.splitlines(keepends=True), place)
    module = types.ModuleType(name)
    exec(compile(code, place, "exec"), vars(module))
    module.__file__ = place
    import sys

    sys.modules[name] = module
    return module.Net()


def test_another_forward_is_another_encoder():
    code = "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return x.mean((2, 3)){}\n"
    keys = [key(written(code.format(more), "net_of_test"), PLAIN) for more in ("", " ** 2", "")]
    assert keys[0] == keys[2] != keys[1]


def test_training_afterwards_changes_nothing():
    net = network().train()
    encoder = ModuleEncoder(net, PLAIN)
    before = encoder.encode_images([np.ones((3, 8, 8), np.float32)])
    with torch.no_grad():
        net[1].weight.zero_()
    assert np.array_equal(encoder.encode_images([np.ones((3, 8, 8), np.float32)]), before)
    assert net.training


def named(picture):
    return PLAIN(picture)


def test_importable_functions_are_identified_by_source():
    assert key(network(), named) == key(network(), named)
    assert "0x" not in str(ModuleEncoder(network(), named).image_identity)


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (network(), {}, "needs transform="),
        (network(), {"transform": lambda picture: PLAIN(picture)}, "give digest="),
        (network(), {"transform": transforms.Lambda(PLAIN)}, "give digest="),
        (network(), {"transform": transforms.Compose([transforms.RandomCrop(8), transforms.ToTensor()])}, "different"),
        (network()[:1], {"transform": transforms.Resize(8)}, r"expected \(3, H, W\)"),
        (torch.nn.Conv2d(3, 4, 3), {"transform": PLAIN}, r"returned a tensor \(1, 4, 6, 6\); expected features"),
        (network(), {"transform": PLAIN, "preprocess": "central-crop"}, "are for models by name"),
        ("tiny", {"transform": PLAIN}, "transform: for a torch module"),
    ],
)
def test_modules_that_are_not_encoders_are_refused(module, options, said, tmp_path):
    with pytest.raises(EncoderError, match=said):
        encode(NumpyDataset(), model=module, root=tmp_path, **options)
