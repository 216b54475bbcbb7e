"""What may be done to the pixels of a sample besides cutting, mirroring and turning it."""

from enum import IntEnum


class Operation(IntEnum):
    """Codes of `Plan.ops`; what each does with its four amounts, of which it ignores those that are not named.

    All but ERASE act on 8-bit R, G, B pixels as torchvision.transforms.v2.functional does on a uint8 tensor:
    nearest-neighbour interpolation, black where the source is outside.
    """

    NOTHING = 0
    # How far a row moves per row, a column per column (the tangent of the angle); the top left corner stays.
    SHEAR_X = 1
    SHEAR_Y = 2
    # Whole pixels to the right, downwards.
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    # Degrees, counter-clockwise, about the centre.
    ROTATE = 5
    # A factor, 0 or more; 1 changes nothing.
    BRIGHTNESS = 6
    SATURATION = 7
    CONTRAST = 8
    SHARPNESS = 9
    # Bits kept, 0 to 8.
    POSTERIZE = 10
    # Values at or above it are inverted, 0 to 255.
    SOLARIZE = 11
    AUTO_CONTRAST = 12
    EQUALIZE = 13
    INVERT = 14
    # Share of the colour circle, -0.5 to 0.5.
    HUE = 15
    # Three numbers added to R, G and B, on the scale of 0 to 255.
    LIGHTING = 16
    # (y, x, height, width) in pixels of the output, set to 0 after normalisation: the mean colour.
    ERASE = 17
