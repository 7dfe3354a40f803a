"""The diffusion transformer of fmjax written in PyTorch, a reference to measure and to compare with.

Its blocks are those of (Peebles and Xie 2023), attention by `scaled_dot_product_attention`. It takes its sizes from fmjax's network, and
its modules have the names of fmjax's, so that weights go over by name. Only what the benchmarks use is here: sinusoids of the time,
added positions, the defaults of normalisation and MLP, no dropout. Images are (B, C, H, W).
"""

import importlib

import jax
import numpy as np

from fmjax.models import layers

# By name, since it is not installed where the code is checked.
torch = importlib.import_module("torch")
nn, functional = torch.nn, torch.nn.functional

LEAVES = {"kernel": "weight", "embedding": "weight", "bias": "bias"}


def load(network, params):
    """The network with the parameters of fmjax's, or with anything of their shape, such as their gradients."""
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["params"]):
        *names, kind = (key.key for key in path)
        # Inputs, outputs -> outputs, inputs, and the sides of a convolution's kernel last.
        array = np.moveaxis(np.asarray(leaf), (-1, -2), (0, 1)) if kind == "kernel" else np.asarray(leaf)
        name = ".".join((*names, LEAVES[kind]))
        state[name] = torch.tensor(array.reshape(shapes[name]).copy())
    network.load_state_dict(state)
    return network


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


class MLP(nn.Module):
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
        self.mlp = MLP(width, int(width * model.mlp_ratio))
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


def flow_matching(network, x_0, x_1, t, y):
    """The loss of `losses.flow_matching` on the linear path, its mean."""
    s = t[:, None, None, None]
    return functional.mse_loss(network(s * x_1 + (1 - s) * x_0, t, y), x_1 - x_0)


def trainer(network, optimizer, ema_decay, dtype=torch.float32):
    """One step of training as a function `(x_1, y) -> loss`, computing in that dtype."""
    average = [parameter.detach().clone() for parameter in network.parameters()]

    def step(x_1, y):
        x_0, t = torch.randn_like(x_1), torch.rand(len(x_1), device=x_1.device)
        with torch.autocast(x_1.device.type, dtype, enabled=dtype != torch.float32):
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
