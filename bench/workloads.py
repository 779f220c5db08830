"""The workloads of every benchmark: names and shapes, nothing else."""

from typing import NamedTuple


class ConvReLUPool(NamedTuple):
    """N C H W -> K, square filter and pool."""

    N: int
    C: int
    H: int
    W: int
    K: int
    kernel: int
    stride: int
    padding: int
    pool_size: int
    pool_stride: int
    pool_padding: int


CONV_RELU_POOL = {
    "notes_conv1": ConvReLUPool(64, 1, 28, 28, 32, 3, 1, 1, 2, 2, 0),
    "notes_conv2": ConvReLUPool(64, 32, 14, 14, 64, 3, 1, 1, 2, 2, 0),
    "lenet_c1": ConvReLUPool(64, 1, 32, 32, 6, 5, 1, 0, 2, 2, 0),
    "lenet_c3": ConvReLUPool(64, 6, 14, 14, 16, 5, 1, 0, 2, 2, 0),
    "alexnet_conv1": ConvReLUPool(16, 3, 224, 224, 64, 11, 4, 2, 3, 2, 0),
    "vgg_b1": ConvReLUPool(8, 64, 224, 224, 64, 3, 1, 1, 2, 2, 0),
    "vgg_b3": ConvReLUPool(8, 256, 56, 56, 256, 3, 1, 1, 2, 2, 0),
    "vgg_b5": ConvReLUPool(8, 512, 14, 14, 512, 3, 1, 1, 2, 2, 0),
    "resnet_stem": ConvReLUPool(16, 3, 224, 224, 64, 7, 2, 3, 3, 2, 1),
}


class BatchNorm(NamedTuple):
    N: int
    C: int
    H: int
    W: int


BATCH_NORM = {
    "64x64x112x112": BatchNorm(64, 64, 112, 112),
    "64x256x56x56": BatchNorm(64, 256, 56, 56),
    "64x512x28x28": BatchNorm(64, 512, 28, 28),
    "64x2048x7x7": BatchNorm(64, 2048, 7, 7),
    "64x32x14x14": BatchNorm(64, 32, 14, 14),
}


class GRU(NamedTuple):
    """x [T, N, C], states of H units."""

    T: int
    N: int
    C: int
    H: int
    layers: int = 1
    bidirectional: bool = False


GRUS = {
    "char": GRU(128, 32, 128, 256),
    "large": GRU(128, 32, 256, 512),
    "stream": GRU(512, 1, 64, 128),
    "bidir": GRU(100, 64, 32, 64, 2, True),
    "decode": GRU(1, 64, 256, 512),
}


class Attention(NamedTuple):
    B: int
    H: int
    Lq: int
    Lk: int
    D: int
    causal: bool = False
    dropout: float = 0.0


ATTENTION = {
    "vit": Attention(8, 12, 197, 197, 64),
    "bert": Attention(4, 12, 512, 512, 64),
    "gpt2": Attention(1, 12, 1024, 1024, 64, causal=True),
    "long": Attention(1, 8, 4096, 4096, 64, causal=True),
    "wide": Attention(1, 8, 4096, 4096, 128, causal=True),
    "dropout": Attention(2, 8, 512, 512, 64, dropout=0.1),
}


class Decode(NamedTuple):
    B: int
    Hq: int
    Hkv: int
    Lk: int
    D: int


DECODE = {"decode": Decode(8, 32, 8, 8192, 128)}


class Growth(NamedTuple):
    """A workload of which one size grows, that of `fields`."""

    axis: str
    workload: ConvReLUPool | GRU | Attention
    fields: tuple[str, ...]
    sizes: tuple[int, ...]


SCALING = {
    "convolution, batch": Growth("batch", CONV_RELU_POOL["notes_conv2"], ("N",), (1, 8, 64)),
    "GRU, length": Growth("sequence length", GRUS["char"], ("T",), (16, 64, 256)),
    "GRU, units": Growth("hidden size", GRUS["char"], ("H",), (64, 128, 256, 512)),
    "attention, length": Growth("sequence length", Attention(1, 8, 0, 0, 64, True), ("Lq", "Lk"), (128, 512, 2048)),
}
BY_THREADS = {  # 1, 2, 4, ... as many as there are
    "convolution, threads": CONV_RELU_POOL["notes_conv2"],
    "GRU, threads": GRUS["char"],
    "attention, threads": ATTENTION["gpt2"],
}


class Network(NamedTuple):
    """Of the zoo: shapes of its inputs but for the batch, of tokens where there is a vocabulary."""

    shapes: tuple[tuple[int, ...], ...]
    batch: int = 8
    vocabulary: int = 0


IMAGE = ((3, 224, 224),)
MODELS = {
    "lenet5": Network(((1, 32, 32),), 64),
    "notes_cnn": Network(((1, 28, 28),), 64),
    "alexnet": Network(IMAGE),
    "vgg16": Network(IMAGE),
    "resnet18": Network(IMAGE),
    "resnet50": Network(IMAGE),
    "gru_classifier": Network(((28, 28),), 64),
    "seq2seq": Network(((40,), (40,)), 8, 10_000),
    "transformer": Network(((64,), (64,)), 8, 10_000),
    "gpt2": Network(((256,),), 2, 50_257),
    "vit_b_16": Network(IMAGE),
}
