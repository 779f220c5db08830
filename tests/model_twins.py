"""The architectures of the zoo of torch's own layers, nothing fused, with the same names of parameters."""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn


def linear(sizes: list[int]) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return layers[:-1]


def named(names: str, layers: list[nn.Module]) -> nn.Module:
    return nn.Sequential(OrderedDict(zip(names.split(), layers, strict=True)))


def torch_lenet5() -> nn.Module:
    names = "c1 relu1 pool1 c3 relu3 pool3 flatten c5 relu5 f6 relu6 output"
    first, second = ([nn.Conv2d(*sizes, 5), nn.ReLU(), nn.MaxPool2d(2)] for sizes in ((1, 6), (6, 16)))
    return named(names, [*first, *second, nn.Flatten(), *linear([400, 120, 84, 10])])


def torch_notes_cnn() -> nn.Module:
    names = "conv1 relu1 pool1 conv2 relu2 pool2 flatten fc1 relu3 fc2"
    first, second = ([nn.Conv2d(*sizes, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)] for sizes in ((1, 32), (32, 64)))
    return named(names, [*first, *second, nn.Flatten(), *linear([3136, 128, 10])])


def torch_notes_fnn() -> nn.Module:
    return named("flatten fc1 relu1 fc2 relu2 fc3", [nn.Flatten(), *linear([784, 512, 32, 10])])


def torchvision(features: list[nn.Module], side: int, classifier: list[nn.Module]) -> nn.Module:
    layers = [nn.Sequential(*features), nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Sequential(*classifier)]
    return named("features avgpool flatten classifier", layers)


def torchvision_alexnet() -> nn.Module:
    features = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    features += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for sizes in ((192, 384), (384, 256), (256, 256)):
        features += [nn.Conv2d(*sizes, 3, padding=1), nn.ReLU()]
    first, relu, second, *rest = linear([256 * 36, 4096, 4096, 1000])
    return torchvision([*features, nn.MaxPool2d(3, 2)], 6, [nn.Dropout(), first, relu, nn.Dropout(), second, *rest])


def torchvision_vgg(letters: str, batch_norm: bool = False) -> Callable[[], nn.Module]:
    """A network by torchvision's configuration: a convolution by its output channels, M for a pool."""

    def build() -> nn.Module:
        features, channels = [], 3
        for letter in letters.split():
            if letter == "M":
                features.append(nn.MaxPool2d(2))
            else:
                features.append(nn.Conv2d(channels, channels := int(letter), 3, padding=1))
                features += [nn.BatchNorm2d(channels), nn.ReLU()] if batch_norm else [nn.ReLU()]
        first, relu1, second, relu2, third = linear([512 * 49, 4096, 4096, 1000])
        return torchvision(features, 7, [first, relu1, nn.Dropout(), second, relu2, nn.Dropout(), third])

    return build


VGG = {
    "vgg11": "64 M 128 M 256 256 M 512 512 M 512 512 M",
    "vgg13": "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    "vgg16": "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    "vgg19": "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Gate(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    """Convolutions with batch norm, ReLU between them, perhaps a gate, and a skip connection around all."""

    def __init__(self, convs: list[nn.Module], gated: bool = False, downsample: nn.Module | None = None):
        super().__init__()
        self.depth = len(convs)
        for i, layer in enumerate(convs, 1):
            self.add_module(f"conv{i}", layer)
            self.add_module(f"bn{i}", nn.BatchNorm2d(layer.out_channels))
        if gated:
            self.se_module = Gate(convs[-1].out_channels)
        self.gated = gated
        if downsample is not None:
            self.downsample = nn.Sequential(downsample, nn.BatchNorm2d(downsample.out_channels))
        self.projected = downsample is not None

    def forward(self, x: Tensor) -> Tensor:
        skip = self.downsample(x) if self.projected else x
        for i in range(1, self.depth + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = torch.relu(x) if i < self.depth else x
        return torch.relu((self.se_module(x) if self.gated else x) + skip)


def basic(inputs: int, width: int, stride: int) -> nn.Module:
    skip = None if inputs == width and stride == 1 else conv(inputs, width, 1, stride)
    return Residual([conv(inputs, width, 3, stride), conv(width, width, 3)], downsample=skip)


def bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    convs = [conv(inputs, width, 1), conv(width, width, 3, stride), conv(width, 4 * width, 1)]
    return Residual(convs, downsample=None if inputs == 4 * width else conv(inputs, 4 * width, 1, stride))


def se_bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    convs = [conv(inputs, width, 1, stride), conv(width, width, 3), conv(width, 4 * width, 1)]
    return Residual(convs, True, None if inputs == 4 * width else conv(inputs, 4 * width, 1, stride))


def senet154_bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    convs = [
        conv(inputs, 2 * width, 1),
        conv(2 * width, 4 * width, 3, stride, groups=64),
        conv(4 * width, 4 * width, 1),
    ]
    skip = conv(inputs, 4 * width, 3 if stride == 2 else 1, stride)
    return Residual(convs, True, None if inputs == 4 * width else skip)


def stages(block: Callable[[int, int, int], nn.Module], inputs: int, expansion: int, depths: list[int]) -> list:
    layers = []
    for width, stride, depth in zip((64, 128, 256, 512), (1, 2, 2, 2), depths):
        blocks = [block(inputs, width, stride)] + [block(expansion * width, width, 1) for _ in range(depth - 1)]
        layers.append(nn.Sequential(*blocks))
        inputs = expansion * width
    return layers


def torchvision_resnet(block: Callable[[int, int, int], nn.Module], expansion: int, depths: list[int]) -> nn.Module:
    stem = [conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512 * expansion, 1000)]
    names = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool flatten fc"
    return named(names, [*stem, *stages(block, 64, expansion, depths), *head])


def timm_se_resnet(depths: list[int]) -> nn.Module:
    stem = named("conv1 bn1 relu1", [conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU()])
    return timm_senet(stem, se_bottleneck, 64, depths)


def timm_senet154() -> nn.Module:
    stem = [
        layer
        for sizes in ((3, 64, 3, 2), (64, 64, 3), (64, 128, 3))
        for layer in (conv(*sizes), nn.BatchNorm2d(sizes[1]), nn.ReLU())
    ]
    names = "conv1 bn1 relu1 conv2 bn2 relu2 conv3 bn3 relu3"
    return timm_senet(named(names, stem), senet154_bottleneck, 128, [3, 8, 36, 3])


def timm_senet(stem: nn.Module, block: Callable, inputs: int, depths: list[int]) -> nn.Module:
    layers = [stem, nn.MaxPool2d(3, 2, ceil_mode=True), *stages(block, inputs, 4, depths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(2048, 1000)]
    names = "layer0 pool0 layer1 layer2 layer3 layer4 avg_pool flatten dropout last_linear"
    return named(names, [*layers, *head])


class Appended(nn.Sequential):
    """The input and what the layers make of it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


def dense_layer(inputs: int) -> nn.Module:
    norm1, norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(128)
    layers = [norm1, nn.ReLU(), conv(inputs, 128, 1), norm2, nn.ReLU(), conv(128, 32, 3)]
    return Appended(OrderedDict(zip(["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"], layers)))


def torchvision_densenet(depths: list[int]) -> nn.Module:
    names = "conv0 norm0 relu0 pool0"
    layers = [conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for i, depth in enumerate(depths, 1):
        block = [dense_layer(inputs + 32 * j) for j in range(depth)]
        layers.append(named(" ".join(f"denselayer{j + 1}" for j in range(depth)), block))
        names += f" denseblock{i}"
        inputs += 32 * depth
        if i < 4:
            parts = [nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, inputs // 2, 1), nn.AvgPool2d(2)]
            layers.append(named("norm relu conv pool", parts))
            names += f" transition{i}"
            inputs //= 2
    features = named(f"{names} norm5 relu5", [*layers, nn.BatchNorm2d(inputs), nn.ReLU()])
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return named("features avgpool flatten classifier", [features, *head])


def basic_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    return named("conv bn relu", [conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs, eps=0.001), nn.ReLU()])


class Inception(nn.Module):
    def __init__(self, inputs: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pool: int):
        super().__init__()
        self.branch1 = basic_conv(inputs, one, 1)
        self.branch2 = nn.Sequential(basic_conv(inputs, reduce3, 1), basic_conv(reduce3, three, 3))
        self.branch3 = nn.Sequential(basic_conv(inputs, reduce5, 1), basic_conv(reduce5, five, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), basic_conv(inputs, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], 1)


class TorchvisionGoogLeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = basic_conv(3, 64, 7, 2)
        self.conv2 = basic_conv(64, 64, 1)
        self.conv3 = basic_conv(64, 192, 3)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)
        for name, inputs in (("aux1", 512), ("aux2", 528)):
            head = [*linear([2048, 1024]), nn.ReLU(), nn.Dropout(0.7), nn.Linear(1024, 1000)]
            layers = [nn.AdaptiveAvgPool2d(4), basic_conv(inputs, 128, 1), nn.Flatten(), *head]
            self.add_module(name, named("pool conv flatten fc1 relu dropout fc2", layers))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(1024, 1000)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.last_pool = nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor):
        x = self.pool(self.conv3(self.conv2(self.pool(self.conv1(x)))))
        a = self.inception4a(self.pool(self.inception3b(self.inception3a(x))))
        d = self.inception4d(self.inception4c(self.inception4b(a)))
        x = self.inception5b(self.inception5a(self.last_pool(self.inception4e(d))))
        logits = self.fc(self.dropout(x.mean((2, 3))))
        return (logits, self.aux2(d), self.aux1(a)) if self.training else logits


def double_conv(inputs: int, width: int) -> nn.Module:
    first, second = ([conv(i, width, 3), nn.BatchNorm2d(width), nn.ReLU()] for i in (inputs, width))
    return named("conv1 bn1 relu1 conv2 bn2 relu2", [*first, *second])


class TorchUNet(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [64, 128, 256, 512, 1024]
        self.encoder = nn.ModuleList(double_conv(*sizes) for sizes in pairwise([1, *widths]))
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[-2::-1])
        self.decoder = nn.ModuleList(double_conv(2 * w, w) for w in widths[-2::-1])
        self.head = nn.Conv2d(64, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four, five = self.encoder
        pool = nn.MaxPool2d(2)
        a = one(x)
        b = two(pool(a))
        c = three(pool(b))
        d = four(pool(c))
        x = five(pool(d))
        for skip, up, level in zip((d, c, b, a), self.upsample, self.decoder):
            x = level(torch.cat([skip, up(x)], 1))
        return self.head(x)


class TorchSequenceClassifier(nn.Module):
    def __init__(self, layer: Callable[..., nn.Module]):
        super().__init__()
        self.rnn = layer(28, 128, batch_first=True)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class ViTBlock(nn.Module):
    def __init__(self, heads: int, width: int, mlp: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        layers = [nn.Linear(width, mlp), nn.GELU(), nn.Dropout(0.0), nn.Linear(mlp, width)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y)[0]
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(nn.Module):
    def __init__(self, image: int, patch: int, layers: int, heads: int, width: int, mlp: int):
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.conv_proj = nn.Conv2d(3, width, patch, patch)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.empty(1, 1 + (image // patch) ** 2, width))
        blocks = [ViTBlock(heads, width, mlp) for _ in range(layers)]
        self.encoder.layers = named(" ".join(f"encoder_layer_{i}" for i in range(layers)), blocks)
        self.encoder.ln = nn.LayerNorm(width, eps=1e-6)
        self.heads = named("head", [nn.Linear(width, 1000)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1) + self.encoder.pos_embedding
        return self.heads(self.encoder.ln(self.encoder.layers(x))[:, 0])


class TorchTransformer(nn.Module):
    """Without dropout."""

    def __init__(
        self,
        sources: int = 10_000,
        targets: int = 10_000,
        width: int = 512,
        heads: int = 8,
        layers: int = 6,
        feed_forward: int = 2048,
        longest: int = 128,
    ):
        super().__init__()
        self.source = nn.Embedding(sources, width)
        self.target = nn.Embedding(targets, width)
        options = {"dropout": 0.0, "batch_first": True}
        encoder = nn.TransformerEncoderLayer(width, heads, feed_forward, **options)
        self.encoder = nn.TransformerEncoder(encoder, layers, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, heads, feed_forward, **options), layers)
        stacks = {"custom_encoder": self.encoder, "custom_decoder": self.decoder}
        self.transformer = [nn.Transformer(width, heads, batch_first=True, **stacks)]  # in a list: no keys of its own
        self.fc = nn.Linear(width, targets)
        angles = [[t / 10000 ** (2 * (i // 2) / width) for i in range(width)] for t in range(longest)]
        table = [[math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(row)] for row in angles]
        self.register_buffer("table", torch.tensor(table), persistent=False)

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        padding = None if lengths is None else torch.arange(source.shape[1]) >= lengths.unsqueeze(1)
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        causal = torch.ones(target.shape[1], target.shape[1], device=target.device).triu(1).bool()
        pair = (self.embed(self.source, source), self.embed(self.target, target))
        return self.fc(self.transformer[0](*pair, tgt_mask=causal, tgt_is_causal=True, **masks))

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        """Scaled, with sinusoids."""
        return math.sqrt(embedding.embedding_dim) * embedding(tokens) + self.table[: tokens.shape[1]]


class TorchAdditiveAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.state = nn.Linear(width, width, bias=False)
        self.memory = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, states: Tensor, memory: Tensor) -> Tensor:
        energies = self.score((self.state(states).unsqueeze(2) + self.memory(memory).unsqueeze(1)).tanh())
        return energies.squeeze(-1).softmax(-1) @ memory


class TorchDotAttention(nn.Module):
    def forward(self, states: Tensor, memory: Tensor) -> Tensor:
        return (states @ memory.mT).softmax(-1) @ memory


class TorchSeq2Seq(nn.Module):
    """Of sequences of one length."""

    def __init__(
        self,
        attention: str | None = "additive",
        sources: int = 10_000,
        targets: int = 10_000,
        embedding: int = 256,
        width: int = 512,
    ):
        super().__init__()
        self.source = nn.Embedding(sources, embedding)
        self.encoder = nn.GRU(embedding, width // 2, bidirectional=True, batch_first=True)
        self.target = nn.Embedding(targets, embedding)
        self.decoder = nn.GRU(embedding, width, batch_first=True)
        self.attention = None
        if attention is not None:
            self.attention = TorchAdditiveAttention(width) if attention == "additive" else TorchDotAttention()
            self.combine = nn.Linear(2 * width, width)
        self.fc = nn.Linear(width, targets)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, h_n = self.encoder(self.source(source))
        h, _ = self.decoder(self.target(target), torch.cat([h_n[0::2], h_n[1::2]], -1))
        if self.attention is not None:
            h = self.combine(torch.cat([self.attention(h, memory), h], -1)).tanh()
        return self.fc(h)


def transformers_gpt2() -> nn.Module:
    """Without dropout, and without the cache that only generation needs."""
    import transformers  # not on Python 3.10

    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False, **rates))


TWINS = {
    "alexnet": torchvision_alexnet,
    "densenet121": partial(torchvision_densenet, [6, 12, 24, 16]),
    "densenet169": partial(torchvision_densenet, [6, 12, 32, 32]),
    "densenet201": partial(torchvision_densenet, [6, 12, 48, 32]),
    "elman": partial(TorchSequenceClassifier, nn.RNN),
    "googlenet": TorchvisionGoogLeNet,
    "gpt2": transformers_gpt2,
    "gru_classifier": partial(TorchSequenceClassifier, nn.GRU),
    "lenet5": torch_lenet5,
    "lstm_classifier": partial(TorchSequenceClassifier, nn.LSTM),
    "notes_cnn": torch_notes_cnn,
    "notes_fnn": torch_notes_fnn,
    "resnet18": partial(torchvision_resnet, basic, 1, [2, 2, 2, 2]),
    "resnet34": partial(torchvision_resnet, basic, 1, [3, 4, 6, 3]),
    "resnet50": partial(torchvision_resnet, bottleneck, 4, [3, 4, 6, 3]),
    "resnet101": partial(torchvision_resnet, bottleneck, 4, [3, 4, 23, 3]),
    "resnet152": partial(torchvision_resnet, bottleneck, 4, [3, 8, 36, 3]),
    "se_resnet50": partial(timm_se_resnet, [3, 4, 6, 3]),
    "se_resnet152": partial(timm_se_resnet, [3, 8, 36, 3]),
    "senet154": timm_senet154,
    "seq2seq": TorchSeq2Seq,
    "transformer": TorchTransformer,
    "unet": TorchUNet,
    "vit_b_16": partial(TorchvisionViT, 224, 16, 12, 12, 768, 3072),
    **{name: torchvision_vgg(letters) for name, letters in VGG.items()},
    **{f"{name}_bn": torchvision_vgg(letters, batch_norm=True) for name, letters in VGG.items()},
}
