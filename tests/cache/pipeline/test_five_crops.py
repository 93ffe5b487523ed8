from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from ulfine_fast.cache.pipeline.five_crops import NUM_CROPS, Cropped, crop_box


@pytest.mark.parametrize("size", [(496, 744), (744, 496), (496, 496)])
def test_the_boxes_are_those_of_five_crop_after_a_resize_to_248(size):
    # every pixel tells where it stands
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    coordinates = Image.fromarray(np.stack([x * 255 // size[0], y * 255 // size[1], 0 * x], axis=-1).astype(np.uint8))
    expected = v2.FiveCrop(224)(v2.Resize(248, interpolation=v2.InterpolationMode.BICUBIC)(coordinates))
    # torchvision: top left, top right, bottom left, bottom right, middle
    for number, crop in enumerate(expected):
        actual = Cropped(lambda one: one.resize((224, 224), Image.Resampling.BICUBIC), number)(coordinates)
        assert np.abs(np.asarray(actual).astype(int) - np.asarray(crop)).max() <= 2


def test_crops_lie_inside_and_are_square():
    for size in ((1, 1), (2, 9), (31, 20), (333, 500)):
        boxes = [crop_box(size, number) for number in range(NUM_CROPS)]
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            assert right - left == bottom - top == max(1, round(min(size) * 224 / 248))
        assert boxes[3][2:] == size
    assert len(set(boxes)) == 5


def test_a_crop_travels_to_reader_processes():
    again = pickle.loads(pickle.dumps(Cropped(np.asarray, 3)))
    assert again == Cropped(np.asarray, 3)
    image = Image.fromarray(np.arange(62 * 62, dtype=np.uint8).reshape(62, 62))
    np.testing.assert_array_equal(again(image), np.asarray(image)[6:, 6:])
