"""The model zoo: one architecture a file, built from the fused layers."""

from fastarch.models.alexnet import alexnet
from fastarch.models.lenet5 import lenet5
from fastarch.models.notes_cnn import notes_cnn
from fastarch.models.notes_fnn import notes_fnn
from fastarch.models.vgg import vgg11, vgg13, vgg16, vgg19

__all__ = ["alexnet", "lenet5", "notes_cnn", "notes_fnn", "vgg11", "vgg13", "vgg16", "vgg19"]
