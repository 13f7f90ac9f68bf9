"""The handwritten digits that come with scikit-learn: 1,797 grey pictures of 8 x 8 pixels."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset


class Digits(Dataset):
    """Pictures in [-1, 1] with their labels: those to train on, or every sixth, which are kept to test with."""

    def __init__(self, *, test: bool = False) -> None:
        pixels, labels = load_digits(return_X_y=True)
        kept = torch.arange(len(labels)) % 6 == 0
        here = kept if test else ~kept
        self.images = torch.tensor(pixels, dtype=torch.float32)[here].view(-1, 1, 8, 8) / 8 - 1  # N, C, H, W
        self.labels = torch.tensor(labels)[here]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.images[i], "label": self.labels[i]}
