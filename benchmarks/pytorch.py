"""The networks of fmjax written in PyTorch, to measure beside them.

The transformer's blocks are those of (Peebles and Xie 2023), attention by `scaled_dot_product_attention`; the U-Net is that of
`fmjax.models.unet`, its images in the order "channels last". A twin takes its sizes from fmjax's network, and its modules have
the names of fmjax's, so that weights go over by name. Only what the benchmarks use is here: sinusoids of the time, added
positions, the defaults of normalisation and perceptron, no dropout. Images are (B, C, H, W).
"""

import importlib

import jax
import numpy as np

from fmjax.models import layers

# By name, since it is not installed where the code is checked.
torch = importlib.import_module("torch")
nn, functional = torch.nn, torch.nn.functional

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def load(network, params):
    """The network with the parameters of its twin in fmjax, or with anything of their shape, such as their gradients."""
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["params"]):
        *names, kind = (key.key for key in path)
        array = np.asarray(leaf)
        if kind == "kernel":
            # Inputs, outputs -> outputs, inputs, and the sides of a convolution's kernel last.
            array = np.moveaxis(array, (-1, -2), (0, 1))
        name = ".".join((*names, LEAVES[kind]))
        state[name] = torch.tensor(array.reshape(shapes[name]).copy())
    network.load_state_dict(state)
    return network


def images(x):
    """A batch of fmjax's images, (B, H, W, C), as PyTorch's."""
    return torch.tensor(np.asarray(x).copy()).permute(0, 3, 1, 2)


class Time(nn.Module):
    """`layers.TimeEmbedding` of `layers.Sinusoids`."""

    def __init__(self, encoding, width):
        super().__init__()
        half = encoding.features // 2
        self.scale = encoding.scale
        self.register_buffer("frequencies", encoding.max_period ** (-torch.arange(half) / half), persistent=False)
        self.Dense_0, self.Dense_1 = nn.Linear(encoding.features, width), nn.Linear(width, width)

    def forward(self, t):
        phase = self.scale * t[:, None] * self.frequencies
        return self.Dense_1(functional.silu(self.Dense_0(torch.cat([phase.cos(), phase.sin()], dim=-1))))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.Dense_0, self.Dense_1 = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h):
        q, k, v = self.Dense_0(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.Dense_1(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    def __init__(self, width, wide):
        super().__init__()
        self.Dense_0, self.Dense_1 = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, h):
        return self.Dense_1(functional.gelu(self.Dense_0(h), approximate="tanh"))


def norm(width):
    return nn.LayerNorm(width, elementwise_affine=False, eps=layers.LayerNorm.epsilon)


def modulate(h, shift, scale):
    return h * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, model):
        super().__init__()
        width = model.hidden_size
        self.norm_1, self.norm_2 = norm(width), norm(width)
        self.attention = Attention(width, model.num_heads)
        self.mlp = Perceptron(width, int(width * model.mlp_ratio))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, h, c):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(functional.silu(c))[:, None].chunk(6, dim=-1)
        h = h + gate_1 * self.attention(modulate(self.norm_1(h), shift_1, scale_1))
        return h + gate_2 * self.mlp(modulate(self.norm_2(h), shift_2, scale_2))


class DiT(nn.Module):
    """`dit.DiT` for images of one shape, (H, W, C), with classes."""

    def __init__(self, model, shape):
        super().__init__()
        height, width, channels = shape
        self.patch, self.rows, self.depth = model.patch_size, height // model.patch_size, model.depth
        positions = layers.grid_positions(self.rows, width // model.patch_size, model.hidden_size)
        self.register_buffer("positions", torch.tensor(positions), persistent=False)
        self.patches = nn.ModuleDict({"Conv_0": nn.Conv2d(channels, model.hidden_size, model.patch_size, model.patch_size)})
        self.time, self.label = Time(model.time_embedding, model.hidden_size), nn.Embedding(model.num_classes + 1, model.hidden_size)
        for i in range(model.depth):
            self.add_module(f"block_{i}", Block(model))
        self.last_norm, self.last_modulation = norm(model.hidden_size), nn.Linear(model.hidden_size, 2 * model.hidden_size)
        self.last = nn.Linear(model.hidden_size, model.patch_size**2 * channels * (1 + model.learn_sigma))

    def forward(self, x, t, y):
        h = self.patches["Conv_0"](x).flatten(2).transpose(1, 2) + self.positions
        c = self.time(t) + self.label(y)
        for i in range(self.depth):
            h = getattr(self, f"block_{i}")(h, c)
        h = modulate(self.last_norm(h), *self.last_modulation(functional.silu(c))[:, None].chunk(2, dim=-1))
        h = self.last(h).unflatten(1, (self.rows, -1)).unflatten(-1, (self.patch, self.patch, -1))
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def convolution(channels, out, stride=1):
    return nn.Conv2d(channels, out, 3, stride, padding=1)


class Residual(nn.Module):
    def __init__(self, model, channels, out, resample=None):
        super().__init__()
        self.resample, self.scale_shift = resample, model.scale_shift_norm
        self.norm_in, self.norm_out = nn.GroupNorm(model.groups, channels), nn.GroupNorm(model.groups, out)
        self.conv_in, self.conv_out = convolution(channels, out), convolution(out, out)
        self.embedding = nn.Linear(4 * model.model_channels, out * (1 + model.scale_shift_norm))
        if channels != out:
            self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, h, e):
        skip = h
        h = functional.silu(self.norm_in(h))
        if self.resample is not None:
            h, skip = self.resample(h), self.resample(skip)
        h = self.conv_in(h)
        e = self.embedding(functional.silu(e))[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + e)
        return (self.skip(skip) if hasattr(self, "skip") else skip) + self.conv_out(functional.silu(h))


class PixelAttention(nn.Module):
    def __init__(self, model, channels):
        super().__init__()
        self.heads = model.num_heads or channels // model.head_dim
        self.norm = nn.GroupNorm(model.groups, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, h):
        pixels = self.norm(h).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(pixels).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        out = self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + out.transpose(1, 2).unflatten(2, h.shape[2:])


def halve(h):
    return functional.avg_pool2d(h, 2)


def double(h):
    return functional.interpolate(h, scale_factor=2.0, mode="nearest")


class UNet(nn.Module):
    """`unet.UNet` for images of one shape, (H, W, C)."""

    def __init__(self, model, shape):
        super().__init__()
        channels = [int(model.model_channels * multiplier) for multiplier in model.channel_mult]
        self.levels, self.blocks, self.resample_blocks = len(channels), model.num_res_blocks, model.resblock_updown
        self.time = Time(model.time_embedding or layers.Sinusoids(model.model_channels), 4 * model.model_channels)
        if model.num_classes is not None:
            self.label = nn.Embedding(model.num_classes + 1, 4 * model.model_channels)

        def attend(name, width, shrink=None):
            if shrink in model.attention_resolutions or (shrink is None and model.attention_resolutions):
                self.add_module(name, PixelAttention(model, width))

        self.add_module("in", convolution(shape[-1], channels[0]))
        seen, here = [channels[0]], channels[0]
        for level, width in enumerate(channels):
            for i in range(model.num_res_blocks):
                self.add_module(f"down_{level}_{i}", Residual(model, here, width))
                attend(f"down_{level}_{i}_attention", width, 2**level)
                here = width
                seen.append(here)
            if level < self.levels - 1:
                down = Residual(model, here, width, halve) if model.resblock_updown else convolution(here, width, 2)
                self.add_module(f"down_{level}", down)
                seen.append(here)

        self.middle_0, self.middle_1 = (Residual(model, here, here) for _ in range(2))
        attend("middle_attention", here)

        for level, width in reversed(list(enumerate(channels))):
            for i in range(model.num_res_blocks + 1):
                self.add_module(f"up_{level}_{i}", Residual(model, here + seen.pop(), width))
                attend(f"up_{level}_{i}_attention", width, 2**level)
                here = width
            if level > 0:
                self.add_module(f"up_{level}", Residual(model, here, width, double) if model.resblock_updown else convolution(here, width))

        self.norm_out = nn.GroupNorm(model.groups, here)
        self.out = convolution(here, shape[-1] * (1 + model.learn_sigma))
        self.to(memory_format=torch.channels_last)

    def attended(self, h, name):
        return getattr(self, name)(h) if hasattr(self, name) else h

    def forward(self, x, t, y=None):
        e = self.time(t)
        if y is not None:
            e = e + self.label(y)

        h = getattr(self, "in")(x)
        seen = [h]
        for level in range(self.levels):
            for i in range(self.blocks):
                h = self.attended(getattr(self, f"down_{level}_{i}")(h, e), f"down_{level}_{i}_attention")
                seen.append(h)
            if level < self.levels - 1:
                down = getattr(self, f"down_{level}")
                h = down(h, e) if self.resample_blocks else down(h)
                seen.append(h)

        h = self.middle_1(self.attended(self.middle_0(h, e), "middle_attention"), e)

        for level in reversed(range(self.levels)):
            for i in range(self.blocks + 1):
                h = getattr(self, f"up_{level}_{i}")(torch.cat([h, seen.pop()], dim=1), e)
                h = self.attended(h, f"up_{level}_{i}_attention")
            if level > 0:
                up = getattr(self, f"up_{level}")
                h = up(h, e) if self.resample_blocks else up(double(h))
        return self.out(functional.silu(self.norm_out(h)))


def flow_matching(network, x_0, x_1, t, y):
    """The loss of `losses.flow_matching` on the linear path, its mean."""
    s = t[:, None, None, None]
    return functional.mse_loss(network(s * x_1 + (1 - s) * x_0, t, y), x_1 - x_0)


def trainer(network, optimizer, ema_decay, dtype=None):
    """One step of training as a function `(x_1, y) -> loss`, computing in another dtype where it is given."""
    average = [parameter.detach().clone() for parameter in network.parameters()]

    def step(x_1, y):
        x_0, t = torch.randn_like(x_1), torch.rand(len(x_1), device=x_1.device)
        with torch.autocast(x_1.device.type, dtype, enabled=dtype is not None):
            loss = flow_matching(network, x_0, x_1, t, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(network.parameters()), 1 - ema_decay)
        return loss.detach()

    return step


def sampler(network, grid, scale, dtype):
    """Euler's method with classifier-free guidance as a function `(x_0, y, null) -> x_1`."""

    @torch.inference_mode()
    def sample(x, y, null):
        both = torch.cat([torch.full_like(y, null), y])
        for t, dt in zip(grid[:-1], np.diff(grid), strict=True):
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                u = network(torch.cat([x, x]), torch.full((len(both),), float(t), device=x.device), both)
            unguided, guided = u.float().chunk(2)
            x = x + float(dt) * ((1 - scale) * unguided + scale * guided)
        return x

    return sample
