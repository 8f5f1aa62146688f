"""The obvious twins of the layouts: the published U-Nets, each under its own names.

Written from the table of networks, plainly: every source spells out its own forward pass. Depth
is the number of pools, ``w`` the channels of the first level.
"""

import torch
from torch import nn
from torch.nn import functional as F


def relu_convs(before, after, norm="", middle=None, bias=True, padding=1, dilation=1):
    """Two 3×3 convolutions as layers of a Sequential; ``norm`` says on which side of the ReLU."""
    layers = []
    for i, o in ((before, middle or after), (middle or after, after)):
        conv = nn.Conv2d(i, o, 3, padding=padding, dilation=dilation, bias=bias)
        order = {
            "": [nn.ReLU()],
            "before": [nn.BatchNorm2d(o), nn.ReLU()],
            "after": [nn.ReLU(), nn.BatchNorm2d(o)],
        }
        layers += [conv, *order[norm]]
    return nn.Sequential(*layers)


def named(**children):
    """A module that only holds others by name."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def cropped(skip, like, half=lambda d: d // 2):
    """The centre of the skip."""
    h, w = like.shape[-2:]
    top, left = half(skip.shape[-2] - h), half(skip.shape[-1] - w)
    return skip[..., top : top + h, left : left + w]


def padded(x, like):
    """Zeros around x, as many as the skip is larger."""
    dy, dx = like.shape[-2] - x.shape[-2], like.shape[-1] - x.shape[-1]
    return F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])


def resized(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def twice(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class ConvBlock(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)))


class Nikhilroxtomar(nn.Module):
    def __init__(self, channels, classes, w, depth=4):
        super().__init__()
        self.depth = depth
        for n in range(1, depth + 1):
            before = channels if n == 1 else w * 2 ** (n - 2)
            self.add_module(f"e{n}", named(conv=ConvBlock(before, w * 2 ** (n - 1))))
        self.b = ConvBlock(w * 2 ** (depth - 1), w * 2**depth)
        for n in range(1, depth + 1):
            c = w * 2 ** (depth - n)
            up = nn.ConvTranspose2d(2 * c, c, 2, stride=2)
            self.add_module(f"d{n}", named(up=up, conv=ConvBlock(2 * c, c)))
        self.outputs = nn.Conv2d(w, classes, 1)

    def forward(self, x):
        skips = []
        for n in range(1, self.depth + 1):
            skips.append(self.get_submodule(f"e{n}").conv(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.b(x)
        for n in range(1, self.depth + 1):
            d = self.get_submodule(f"d{n}")
            x = d.conv(torch.cat([d.up(x), skips[-n]], 1))
        return self.outputs(x)


class DoubleConv(nn.Module):
    """The tutorial, the early Pytorch-UNet, milesial's, and the concat notebook: one skeleton.

    ``inner`` is what a block calls its Sequential, ``up`` one of transpose, conv and none.
    """

    def __init__(
        self, channels, classes, w, depth=4, inner="conv", pool="mpconv", first="conv.conv",
        head="outc.conv", up="transpose", bias=True, wide=False, padding=1, join="pad",
    ):  # fmt: skip
        super().__init__()
        self.depth, self.up_kind, self.join = depth, up, join
        self.inner, self.pool, self.first, self.head = inner, pool, first, head

        def block(before, after, middle=None):
            return relu_convs(before, after, "before", middle, bias, padding)

        self.put(f"inc.{first}", block(channels, w))
        for n in range(1, depth + 1):
            is_kept = n == depth and up == "none"
            after = w * 2 ** (n - 1) if is_kept else w * 2**n
            self.put(f"down{n}.{pool}.1.{inner}", block(w * 2 ** (n - 1), after))
        for n in range(1, depth + 1):
            c = w * 2 ** (depth - n)
            after = max(c // 2, w) if up == "none" else c
            if up == "transpose":
                self.put(f"up{n}.up", nn.ConvTranspose2d(2 * c, c, 2, stride=2))
            elif up == "conv":
                self.put(f"up{n}.up.1", nn.Conv2d(2 * c, c, 1))
            self.put(f"up{n}.conv.{inner}", block(2 * c, after, c if wide else None))
        self.put(head, nn.Conv2d(w, classes, 1))

    def put(self, path, module):
        *parents, name = path.split(".")
        at = self
        for parent in parents:
            if parent not in dict(at.named_children()):
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(name, module)

    def forward(self, x):
        skips = [self.get_submodule(f"inc.{self.first}")(x)]
        for n in range(1, self.depth + 1):
            down = self.get_submodule(f"down{n}.{self.pool}.1.{self.inner}")
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for n in range(1, self.depth + 1):
            skip = skips.pop()
            if self.up_kind == "transpose":
                x = self.get_submodule(f"up{n}.up")(x)
            elif self.up_kind == "conv":
                x = torch.relu(self.get_submodule(f"up{n}.up.1")(twice(x)))
            else:
                x = twice(x)
            if self.join == "crop":
                skip = cropped(skip, x, half=lambda d: round(d / 2))
            elif self.join == "pad":
                x = padded(x, skip)
            x = self.get_submodule(f"up{n}.conv.{self.inner}")(torch.cat([skip, x], 1))
        return self.get_submodule(self.head)(x)


class DeepResearch(nn.Module):
    def __init__(self, channels, classes, w, depth=3):
        super().__init__()
        self.depth = depth

        def block(before, after):
            return relu_convs(before, after, "after", padding=0)

        def up(before, after):
            return nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1)

        for n in range(1, depth + 1):
            before = channels if n == 1 else w * 2 ** (n - 2)
            self.add_module(f"conv_encode{n}", block(before, w * 2 ** (n - 1)))
        c = w * 2 ** (depth - 1)
        self.bottleneck = nn.Sequential(*block(c, 2 * c), up(2 * c, c))
        for n in range(depth, 1, -1):
            c = w * 2 ** (n - 1)
            self.add_module(f"conv_decode{n}", nn.Sequential(*block(2 * c, c), up(c, c // 2)))
        last = [nn.Conv2d(w, classes, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(classes)]
        self.final_layer = nn.Sequential(*block(2 * w, w), *last)

    def forward(self, x):
        skips = []
        for n in range(1, self.depth + 1):
            skips.append(self.get_submodule(f"conv_encode{n}")(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottleneck(x)
        for n in range(self.depth, 0, -1):
            x = torch.cat([x, cropped(skips[n - 1], x)], 1)
            x = self.get_submodule(f"conv_decode{n}" if n > 1 else "final_layer")(x)
        return x


class Dilated(nn.Module):
    def __init__(self, channels, classes, w, depth=4):
        super().__init__()
        self.depth = depth
        for n in range(1, depth + 1):
            before = channels if n == 1 else w * 2 ** (n - 2)
            convs = relu_convs(before, w * 2 ** (n - 1), padding=0, dilation=2)
            dropout = [nn.Dropout(0.5)] if n == depth else []
            down = nn.Sequential(*convs, *dropout, nn.MaxPool2d(2, ceil_mode=True))
            self.add_module(f"enc{n}", named(down=down))

        def block(before, c, *between):
            up = [nn.ConvTranspose2d(c, c // 2, 2, stride=2), nn.ReLU()]
            return nn.Sequential(*relu_convs(before, c, padding=0), *between, *up)

        c = w * 2 ** (depth - 1)
        self.center = block(c, 2 * c, nn.Dropout(0.5))
        for n in range(depth, 1, -1):
            c = w * 2 ** (n - 1)
            self.add_module(f"dec{n}", named(up=block(2 * c, c)))
        self.dec1 = relu_convs(2 * w, w, padding=0)
        self.final = nn.Conv2d(w, classes, 1)

    def forward(self, image):
        x, skips = image, []
        for n in range(1, self.depth + 1):
            x = self.get_submodule(f"enc{n}").down(x)
            skips.append(x)
        x = self.center(x)
        for n in range(self.depth, 0, -1):
            x = torch.cat([x, resized(skips[n - 1], x.shape[-2:])], 1)
            x = self.get_submodule(f"dec{n}.up" if n > 1 else "dec1")(x)
        return resized(self.final(x), image.shape[-2:])


class FromScratch(nn.Module):
    def __init__(self, channels, classes, w, depth=4):
        super().__init__()
        self.depth = depth
        for n in range(1, depth + 2):
            before = channels if n == 1 else w * 2 ** (n - 2)
            self.add_module(f"down_convolution_{n}", relu_convs(before, w * 2 ** (n - 1)))
        for n in range(1, depth + 1):
            c = w * 2 ** (depth - n)
            self.add_module(f"up_transpose_{n}", nn.ConvTranspose2d(2 * c, c, 2, stride=2))
            self.add_module(f"up_convolution_{n}", relu_convs(2 * c, c))
        self.out = nn.Conv2d(w, classes, 1)

    def forward(self, x):
        skips = []
        for n in range(1, self.depth + 1):
            skips.append(self.get_submodule(f"down_convolution_{n}")(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.get_submodule(f"down_convolution_{self.depth + 1}")(x)
        for n in range(1, self.depth + 1):
            x = torch.cat([skips[-n], self.get_submodule(f"up_transpose_{n}")(x)], 1)
            x = self.get_submodule(f"up_convolution_{n}")(x)
        return self.out(x)


class Jvanvugt(nn.Module):
    def __init__(self, channels, classes, w, depth=4, padding=0, norm=""):
        super().__init__()
        widths = [w * 2**n for n in range(depth + 1)]
        self.down_path = nn.ModuleList(
            named(block=relu_convs(before, after, norm, padding=padding))
            for before, after in zip([channels, *widths], widths, strict=False)
        )
        self.up_path = nn.ModuleList(
            named(
                up=nn.ConvTranspose2d(2 * c, c, 2, stride=2),
                conv_block=named(block=relu_convs(2 * c, c, norm, padding=padding)),
            )
            for c in reversed(widths[:-1])
        )
        self.last = nn.Conv2d(w, classes, 1)

    def forward(self, x):
        skips = []
        for step in self.down_path:
            x = step.block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        skips.pop()
        for step in self.up_path:
            x = step.up(x)
            x = step.conv_block.block(torch.cat([x, cropped(skips.pop(), x)], 1))
        return self.last(x)


def milesial(*sizes, **options):
    names = {"inner": "double_conv", "pool": "maxpool_conv", "first": "double_conv"}
    return DoubleConv(*sizes, **{"bias": False, **names, **options})


def concat(*sizes, **options):
    names = {"pool": "maxpool_conv", "first": "conv", "head": "outc"}
    return DoubleConv(*sizes, **names, **options)


def randomised(network, seed=0):
    """In eval mode, with BatchNorm statistics that are not those of a new network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.ndim == 1:
                value.normal_(generator=generator)
            elif value.ndim == 4:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    return network.eval()
