"""Data modules. torchvision and scikit-learn are imported only when a set of theirs is opened."""

from framework.data.arrays import Npz
from framework.data.base import Image, ImageData
from framework.data.digits import Digits
from framework.data.hub import HuggingFace
from framework.data.memory import MemoryData
from framework.data.shards import WebDataset
from framework.data.torchvision import Torchvision

__all__ = ["Digits", "HuggingFace", "Image", "ImageData", "MemoryData", "Npz", "Torchvision", "WebDataset"]
