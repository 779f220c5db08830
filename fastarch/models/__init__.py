"""The model zoo: one architecture a file, built from the fused layers."""

from fastarch.models.alexnet import alexnet
from fastarch.models.bert import bert
from fastarch.models.densenet import densenet121, densenet169, densenet201
from fastarch.models.googlenet import googlenet
from fastarch.models.gpt2 import gpt2
from fastarch.models.lenet5 import lenet5
from fastarch.models.notes_cnn import notes_cnn
from fastarch.models.notes_fnn import notes_fnn
from fastarch.models.recurrent import elman, gru_classifier, lstm_classifier
from fastarch.models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from fastarch.models.senet import se_resnet50, se_resnet152, senet154
from fastarch.models.seq2seq import seq2seq
from fastarch.models.transformer import transformer
from fastarch.models.unet import unet
from fastarch.models.vgg import vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from fastarch.models.vit import vit_b_16

__all__ = [
    "alexnet",
    "bert",
    "densenet121",
    "densenet169",
    "densenet201",
    "elman",
    "googlenet",
    "gpt2",
    "gru_classifier",
    "lenet5",
    "lstm_classifier",
    "notes_cnn",
    "notes_fnn",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "se_resnet50",
    "se_resnet152",
    "senet154",
    "seq2seq",
    "transformer",
    "unet",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
]
