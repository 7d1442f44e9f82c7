import torch
import torchvision.transforms.functional as F
from PIL import Image

from utils import data


def test_augmentation_equals_torchvision_on_pil_images():
    pixels = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    _, how = data.draw_epoch(64, seed=0, epoch=0)
    ours = data.augment(pixels, how)
    wrong = 0
    for image, result, (top, left), flip, angle in zip(pixels, ours, *how, strict=True):
        pil = F.pad(Image.fromarray(image.numpy()), [data.PADDING])
        pil = F.crop(pil, int(top), int(left), 32, 32)
        pil = F.hflip(pil) if flip else pil
        pil = F.rotate(pil, float(angle))
        wrong += (F.pil_to_tensor(pil).permute(1, 2, 0) != result).any(-1).sum().item()
    assert wrong <= 0.001 * 64 * 32 * 32
