# %% [markdown]
# # Your own model and your own images
#
# Any function from images to features can be the encoder, and a list of images can be the data set. The store is found
# again by the content of both: the digests of the weights and of the images.

# %%
import numpy as np
import torch
from sklearn.datasets import load_digits
from torchvision import transforms

import featcache
import heads

digits = load_digits()
pictures = [np.repeat((image * 15.9).astype(np.uint8), 4, axis=0).repeat(4, axis=1) for image in digits.images[:600]]
labels = digits.target[:600]

# %%
torch.manual_seed(0)
network = torch.nn.Sequential(
    torch.nn.Conv2d(3, 32, 5, stride=4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32 * 49, 64)
)
transform = transforms.Compose([transforms.Resize(32), transforms.ToTensor()])
train, test = (
    featcache.encode(pictures[rows], split, labels=labels[rows], name="mine", model=network, transform=transform)
    for split, rows in (("train", slice(400)), ("test", slice(400, 600)))
)
print(train)

# %%
ridge = heads.Ridge().fit(train)
print(f"random features: {ridge.score(*test.numpy()):.1%}")
