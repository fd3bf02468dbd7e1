"""Six generators as people write them, none on our classes: what ``optimize`` is tested and timed on.

Each follows the manner of the public code that its paper is known by: one long Sequential (DCGAN), Sequentials nested
in skips (pix2pix), residual blocks and instance norm (CycleGAN), a functional transposed convolution with one group for
each sample (StyleGAN2), weight norm (HiFi-GAN), and activations called as functions (WaveGAN).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class DCGAN(nn.Module):
    """Radford et al., 2015: (N, latents, 1, 1) -> (N, 3, 64, 64)."""

    def __init__(self, latents: int = 100, width: int = 64, channels: int = 3, gpus: int = 1) -> None:
        super().__init__()
        self.gpus = gpus
        layers = [nn.ConvTranspose2d(latents, width * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(width * 8), nn.ReLU(True)]
        for multiple in (8, 4, 2):
            inner, outer = width * multiple, width * multiple // 2
            layers += [nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, input):
        if input.is_cuda and self.gpus > 1:
            return nn.parallel.data_parallel(self.main, input, range(self.gpus))
        return self.main(input)


class DCGANDiscriminator(nn.Module):
    """(N, 3, 64, 64) -> (N,), probabilities."""

    def __init__(self, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for multiple in (1, 2, 4):
            inner, outer = width * multiple, width * multiple * 2
            layers += [nn.Conv2d(inner, outer, 4, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(width * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid())

    def forward(self, input):
        return self.main(input).view(-1, 1).squeeze(1)


class UnetBlock(nn.Module):
    """Down, the block inside, up, and the input beside the output."""

    def __init__(self, outer, inner, inputs=None, inside=None, outermost=False, innermost=False, dropout=False) -> None:
        super().__init__()
        self.outermost = outermost
        inputs = outer if inputs is None else inputs
        down_conv = nn.Conv2d(inputs, inner, 4, 2, 1, bias=False)
        down_relu, up_relu = nn.LeakyReLU(0.2, True), nn.ReLU(True)
        if outermost:
            up_conv = nn.ConvTranspose2d(inner * 2, outer, 4, 2, 1)
            layers = [down_conv, inside, up_relu, up_conv, nn.Tanh()]
        elif innermost:
            up_conv = nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False)
            layers = [down_relu, down_conv, up_relu, up_conv, nn.BatchNorm2d(outer)]
        else:
            up_conv = nn.ConvTranspose2d(inner * 2, outer, 4, 2, 1, bias=False)
            layers = [down_relu, down_conv, nn.BatchNorm2d(inner), inside, up_relu, up_conv, nn.BatchNorm2d(outer)]
            if dropout:
                layers.append(nn.Dropout(0.5))
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


class Pix2pix(nn.Module):
    """Isola et al., 2017, the U-Net: (N, 3, H, W) -> (N, 3, H, W), H and W multiples of 2 ** depth."""

    def __init__(self, width: int = 64, depth: int = 8) -> None:
        super().__init__()
        block = UnetBlock(width * 8, width * 8, innermost=True)
        for _ in range(depth - 5):
            block = UnetBlock(width * 8, width * 8, inside=block, dropout=True)
        for multiple in (4, 2, 1):
            block = UnetBlock(width * multiple, width * multiple * 2, inside=block)
        self.model = UnetBlock(3, width, inputs=3, inside=block, outermost=True)

    def forward(self, input):
        return self.model(input)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(True)]
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv_block(x)


class CycleGAN(nn.Module):
    """Zhu et al., 2017, the network of residual blocks: (N, 3, H, W) -> (N, 3, H, W)."""

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.InstanceNorm2d(width), nn.ReLU(True)]
        for channels in (width, width * 2):
            layers += [nn.Conv2d(channels, channels * 2, 3, 2, 1), nn.InstanceNorm2d(channels * 2), nn.ReLU(True)]
        layers += [ResnetBlock(width * 4) for _ in range(blocks)]
        for channels in (width * 4, width * 2):
            layers.append(nn.ConvTranspose2d(channels, channels // 2, 3, 2, 1, output_padding=1))
            layers += [nn.InstanceNorm2d(channels // 2), nn.ReLU(True)]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())

    def forward(self, input):
        return self.model(input)


class EqualLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, activation: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.scale, self.activation = 1 / math.sqrt(inputs), activation

    def forward(self, input):
        out = F.linear(input, self.weight * self.scale, self.bias)
        return F.leaky_relu(out, 0.2) * 2**0.5 if self.activation else out


class Blur(nn.Module):
    """The filter (1, 3, 3, 1) over rows and columns."""

    def __init__(self, padding: tuple[int, int], gain: float = 1.0) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", taps.outer(taps) / taps.sum() ** 2 * gain)
        self.padding = padding

    def forward(self, input):
        channels = input.shape[1]
        kernel = self.kernel.to(input.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(F.pad(input, self.padding * 2), kernel, groups=channels)


class ModulatedConv2d(nn.Module):
    """A convolution whose weight each sample scales: one group for each sample."""

    def __init__(self, inputs, outputs, kernel_size, style_dim, demodulate=True, upsample=False) -> None:
        super().__init__()
        self.inputs, self.outputs, self.kernel_size = inputs, outputs, kernel_size
        self.demodulate, self.upsample = demodulate, upsample
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, inputs, bias=1.0)
        self.scale, self.padding = 1 / math.sqrt(inputs * kernel_size**2), kernel_size // 2
        if upsample:
            self.blur = Blur((1, 1), gain=4.0)

    def forward(self, input, style):
        batch, channels, height, width = input.shape
        style = self.modulation(style).view(batch, 1, channels, 1, 1)
        weight = self.scale * self.weight * style
        if self.demodulate:
            demod = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
            weight = weight * demod.view(batch, self.outputs, 1, 1, 1)
        weight = weight.view(batch * self.outputs, channels, self.kernel_size, self.kernel_size)
        input = input.reshape(1, batch * channels, height, width)
        if self.upsample:
            weight = weight.view(batch, self.outputs, channels, self.kernel_size, self.kernel_size)
            weight = weight.transpose(1, 2).reshape(batch * channels, self.outputs, self.kernel_size, self.kernel_size)
            out = F.conv_transpose2d(input, weight, padding=0, stride=2, groups=batch)
            out = out.view(batch, self.outputs, *out.shape[-2:])
            return self.blur(out)
        out = F.conv2d(input, weight, padding=self.padding, groups=batch)
        return out.view(batch, self.outputs, *out.shape[-2:])


class StyledConv(nn.Module):
    def __init__(self, inputs, outputs, style_dim, upsample=False) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(inputs, outputs, 3, style_dim, upsample=upsample)
        self.noise_weight = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1, outputs, 1, 1))

    def forward(self, input, style, noise=None):
        out = self.conv(input, style)
        if noise is None:
            batch, _, height, width = out.shape
            noise = out.new_empty(batch, 1, height, width).normal_()
        return F.leaky_relu(out + self.noise_weight * noise + self.bias, 0.2) * 2**0.5


class ToRGB(nn.Module):
    def __init__(self, inputs, style_dim) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(inputs, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, input, style, skip=None):
        out = self.conv(input, style) + self.bias
        return out if skip is None else out + F.interpolate(skip, scale_factor=2, mode="bilinear")


class StyleGAN2(nn.Module):
    """Karras et al., 2020: (N, style_dim) -> (N, 3, size, size)."""

    def __init__(self, size: int = 64, style_dim: int = 512, width: int = 512, mapping: int = 8) -> None:
        super().__init__()
        self.style = nn.Sequential(*(EqualLinear(style_dim, style_dim, activation=True) for _ in range(mapping)))
        self.input = nn.Parameter(torch.randn(1, width, 4, 4))
        self.conv1, self.to_rgb1 = StyledConv(width, width, style_dim), ToRGB(width, style_dim)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for i in range(2, int(math.log2(size))):
            self.convs.append(StyledConv(width, width, style_dim, upsample=True))
            self.convs.append(StyledConv(width, width, style_dim))
            self.to_rgbs.append(ToRGB(width, style_dim))
            for layer in (2 * i - 3, 2 * i - 2):
                self.noises.register_buffer(f"noise_{layer}", torch.randn(1, 1, 2 ** (i + 1), 2 ** (i + 1)))

    def forward(self, latents, randomize_noise=False):
        latents = latents * torch.rsqrt(latents.pow(2).mean(1, keepdim=True) + 1e-8)
        style = self.style(latents)
        count = 1 + len(self.convs)
        noises = [None if randomize_noise else getattr(self.noises, f"noise_{i}") for i in range(count)]
        out = self.conv1(self.input.repeat(len(latents), 1, 1, 1), style, noises[0])
        skip = self.to_rgb1(out, style)
        for i, to_rgb in enumerate(self.to_rgbs):
            out = self.convs[2 * i](out, style, noises[2 * i + 1])
            out = self.convs[2 * i + 1](out, style, noises[2 * i + 2])
            skip = to_rgb(out, style, skip)
        return skip


SLOPE = 0.1


def initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        module.weight.data.normal_(0.0, 0.01)


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Module:
            padding = (kernel_size - 1) * dilation // 2
            return weight_norm(nn.Conv1d(channels, channels, kernel_size, 1, padding, dilation))

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)

    def forward(self, x):
        for first, second in zip(self.convs1, self.convs2, strict=True):
            xt = F.leaky_relu(x, SLOPE)
            xt = first(xt)
            xt = F.leaky_relu(xt, SLOPE)
            xt = second(xt)
            x = xt + x
        return x


class HiFiGAN(nn.Module):
    """Kong et al., 2020, V1: mel spectrogram (N, 80, L) -> waveform (N, 1, 256 L)."""

    def __init__(self, mels: int = 80, width: int = 512, norm=weight_norm) -> None:
        super().__init__()
        rates, kernels, self.num_kernels = (8, 8, 2, 2), (16, 16, 4, 4), 3
        self.num_upsamples = len(rates)
        self.conv_pre = norm(nn.Conv1d(mels, width, 7, 1, padding=3))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for i, (rate, kernel) in enumerate(zip(rates, kernels, strict=True)):
            outputs = width // 2 ** (i + 1)
            up = nn.ConvTranspose1d(outputs * 2, outputs, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(norm(up))
            self.resblocks.extend(ResBlock(outputs, size, (1, 3, 5)) for size in (3, 7, 11))
        self.conv_post = norm(nn.Conv1d(outputs, 1, 7, 1, padding=3))
        self.ups.apply(initialize)

    def forward(self, x):
        x = self.conv_pre(x)
        for i in range(self.num_upsamples):
            x = F.leaky_relu(x, SLOPE)
            x = self.ups[i](x)
            xs = None
            for j in range(self.num_kernels):
                if xs is None:
                    xs = self.resblocks[i * self.num_kernels + j](x)
                else:
                    xs += self.resblocks[i * self.num_kernels + j](x)
            x = xs / self.num_kernels
        x = F.leaky_relu(x)
        x = self.conv_post(x)
        return torch.tanh(x)


class WaveGAN(nn.Module):
    """Donahue et al., 2019: (N, latents) -> (N, channels, 16384)."""

    def __init__(self, latents: int = 100, width: int = 64, channels: int = 1, verbose: bool = False) -> None:
        super().__init__()
        self.width, self.verbose = width, verbose
        self.fc1 = nn.Linear(latents, 256 * width)
        self.tconv1 = nn.ConvTranspose1d(16 * width, 8 * width, 25, stride=4, padding=11, output_padding=1)
        self.tconv2 = nn.ConvTranspose1d(8 * width, 4 * width, 25, stride=4, padding=11, output_padding=1)
        self.tconv3 = nn.ConvTranspose1d(4 * width, 2 * width, 25, stride=4, padding=11, output_padding=1)
        self.tconv4 = nn.ConvTranspose1d(2 * width, width, 25, stride=4, padding=11, output_padding=1)
        self.tconv5 = nn.ConvTranspose1d(width, channels, 25, stride=4, padding=11, output_padding=1)
        for module in self.modules():
            if isinstance(module, (nn.ConvTranspose1d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight.data)

    def forward(self, x):
        x = self.fc1(x).view(-1, 16 * self.width, 16)
        x = F.relu(x)
        if self.verbose:
            print(x.shape)
        x = F.relu(self.tconv1(x))
        x = F.relu(self.tconv2(x))
        x = F.relu(self.tconv3(x))
        x = F.relu(self.tconv4(x))
        return torch.tanh(self.tconv5(x))
