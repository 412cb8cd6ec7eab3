"""Renderer of a procedural face: soft masks and a height field on the pixel grid, lit by one lamp and the sky.

Pixels are first mapped to coordinates of the frontal face (`_face_coordinates`), so that a turned head needs no second
set of shapes. `draw` paints the layers from back to front, `expose` is the camera, `compress` the JPEG file.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

from recognition.data.procedural.features import (
    draw_beard,
    draw_brows,
    draw_eyes,
    draw_mouth,
    draw_nostrils,
    draw_skin,
    mouth_y,
)
from recognition.data.procedural.identity import Capture, Identity
from recognition.data.procedural.shapes import Patch, Plane, bump, inside, line, rise, scaled

SIZE = 112
"""Height and width of an image, in pixels, as in InsightFace's aligned sets."""

EYES = (56.0, 51.7)
"""Pixel between the eyes in that alignment."""

_PIXEL_Y, _PIXEL_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)

_ROUND = 42.0
"""Approximate radius of a head in pixels, which turns a relative radius into a distance."""


def draw(identity: Identity, capture: Capture) -> np.ndarray:
    """Draw an identity under a capture, before the camera: float32 [3, 112, 112] RGB, roughly 0..1."""
    x, y = _face_coordinates(identity, capture)
    face = Patch(np.empty((3, SIZE, SIZE), np.float32), x, y, np.abs(x))
    radius = _radius(face, identity, capture, 0.0, 0.0)
    head = inside((radius - 1) * _ROUND, 1.4)
    hair = _hair_light(face, identity, capture)
    _draw_background(face, capture)
    _draw_back_hair(face, identity, capture, hair)
    _draw_body(face, identity, capture)
    _draw_ears(face, identity)
    draw_skin(face, identity, head)
    draw_beard(face, identity, head)
    draw_mouth(face, identity, capture)
    draw_nostrils(face, identity)
    draw_eyes(face, identity, capture)
    _light(face, identity, capture, radius, head)
    draw_brows(face, identity, capture)
    _draw_front_hair(face, identity, capture, hair, head)
    _draw_glasses(face, identity, capture, head)
    _draw_object(face, capture)
    return face.canvas


def expose(canvas: np.ndarray, capture: Capture) -> np.ndarray:
    """Apply the camera: colour cast, exposure, gamma, blur and noise; uint8 [112, 112, 3] RGB."""
    grey = canvas.mean(axis=0)
    gain = 255 * capture.exposure * np.array(capture.tint, np.float32)[:, None, None]
    linear = np.clip((grey + capture.saturation * (canvas - grey)) * gain + 0.5, 0, 255).astype(np.uint8)
    curve = (255 * (np.arange(256) / 255) ** capture.gamma + 0.5).astype(np.uint8)
    image = Image.fromarray(curve[linear.transpose(1, 2, 0)])
    if capture.blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(capture.blur))
    generator = np.random.Generator(np.random.PCG64(capture.noise_seed))
    grain = generator.standard_normal((SIZE, SIZE, 3), dtype=np.float32)
    return np.clip(np.asarray(image) + 255 * capture.noise * grain + 0.5, 0, 255).astype(np.uint8)


def compress(image: np.ndarray, capture: Capture) -> bytes:
    """Compress a photograph to a JPEG file, at the capture's quality."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=capture.quality)
    return stream.getvalue()


def _face_coordinates(identity: Identity, capture: Capture) -> tuple[Plane, Plane]:
    """Map each pixel to x and y on the frontal face: the inverse of turning a shallow bowl with a nose on it."""
    cos, sin = float(np.cos(capture.roll)) / capture.zoom, float(np.sin(capture.roll)) / capture.zoom
    across, down = _PIXEL_X - (EYES[0] + capture.shift[0]), _PIXEL_Y - (EYES[1] + capture.shift[1])
    seen_x, seen_y = cos * across + sin * down, cos * down - sin * across
    yaw_sin, yaw_cos = float(np.sin(capture.yaw)), float(np.cos(capture.yaw))
    pitch_sin, pitch_cos = float(np.sin(capture.pitch)), float(np.cos(capture.pitch))
    # An alignment stretches a turned face, though not all the way back to its width.
    squeeze = 0.5 + 0.5 * yaw_cos
    x, y = seen_x, seen_y
    for _ in range(2):
        depth = 5.0 - 0.0135 * x * x - 0.0045 * (y - 12) ** 2
        depth += identity.nose_height * bump(x, y - identity.nose_length * 0.8, 5.5, 7.0)
        x = (seen_x - depth * yaw_sin) / squeeze
        y = (seen_y + depth * pitch_sin) / pitch_cos
    return x + identity.asymmetry * y, y


def _radius(face: Patch, identity: Identity, capture: Capture, wider: float, taller: float) -> Plane:
    """Return the distance from the head's middle relative to its outline, which is enlarged by two lengths."""
    middle = 5.0
    below = np.clip((face.y - middle) / (identity.chin + 3 * capture.mouth_open + wider * 0.3 - middle), 0, 2)
    above = np.clip((middle - face.y) / (identity.crown + taller + middle), 0, 2)
    width = (identity.head_width + wider) * (1 - identity.jaw_taper * below * below - identity.brow_taper * above)
    across = face.side / np.maximum(width, 8)
    return np.sqrt(across * across + below**identity.jaw_power + above * above * above)


def _height(face: Patch, identity: Identity, capture: Capture, radius: Plane) -> Plane:
    """Return the height of the face over a plane, in pixels, for shading."""
    round_ = np.minimum(radius, 1.05)
    height = 30 * np.sqrt(1.12 - round_ * round_)
    length, nose, smile = identity.nose_length, identity.nose_height, max(capture.smile, 0.0)
    # Sockets, brow ridge, cheekbones and hollow cheeks.
    part = face.rows(-22, 52)
    x, y, side = part.x, part.y, part.side
    outward = side - identity.eye_distance
    relief = -identity.socket * bump(outward + 2, y + 2, 7.5, 5.0)
    relief += 0.6 * identity.socket * bump(outward, y + identity.brow_height, 9, 3.5)
    relief += (identity.cheekbone + 1.3 * smile) * bump(outward - 5, y - 17 + smile, 8, 6)
    relief -= identity.hollow * bump(side - identity.head_width * 0.68, y - 34, 6, 8)
    relief -= identity.bags * np.maximum(1 - np.abs(y - 6.3 + 0.05 * outward**2) / 1.6, 0) * bump(outward, y - 5, 5, 4)
    # The nose: a ridge that rises to the tip and falls off below it, the ball of the tip and the two wings.
    along = np.clip((y + 3) / (length + 3), 0, 1)
    ridge = along ** (1.3 + 0.2 * identity.nose_hook) * rise(y, length + 4.5, length - 2.5)
    flare = identity.nose_bridge + (identity.nose_width * 0.62 - identity.nose_bridge) * along
    relief += 0.8 * nose * ridge * np.maximum(1 - (side / (flare * 1.9)) ** 2, 0) ** 2
    tip, wing = identity.nose_tip * 0.75, identity.nose_width * 0.82
    relief += 0.34 * nose * bump(x, y - length + 1.5, tip, tip)
    relief += 0.26 * nose * bump(side - wing, y - length - 0.3, 2.0, 2.2)
    # The folds from the nose to the corners of the mouth.
    fold = np.maximum(1 - np.abs(side - identity.nose_width - 2.5 - 0.42 * (y - length)) / 2.2, 0)
    relief -= (0.9 * identity.folds + 0.5 * smile) * fold * bump(side - identity.nose_width - 6, y - length - 6, 6, 6)
    height[face.between(-22, 52)] += relief
    # Lips stand out; beneath them is a groove, above them the philtrum; then the chin.
    part = face.rows(length, 80)
    x, y = part.x, part.y
    mouth, drop = mouth_y(identity), 3 * capture.mouth_open
    relief = 1.7 * bump(x, y - mouth, identity.mouth_width * 0.6, 2.6)
    relief -= 1.1 * bump(x, y - mouth - identity.lower_lip - 4 - drop, 8, 2.2)
    relief -= 0.5 * bump(x, y - (length + mouth) / 2 - 1, 1.2, 3.5)
    relief += identity.chin_boss * bump(x, y - identity.chin - drop + 8, 8, 5)
    height[face.between(length, 80)] += relief
    return height


def _light(face: Patch, identity: Identity, capture: Capture, radius: Plane, head: Plane) -> None:
    """Shade the head by Lambert's law and a little gloss from one lamp, and by light from all around."""
    slope_y, slope_x = np.gradient(_height(face, identity, capture, radius))
    # The head turns under a lamp that stays.
    slope_x += float(np.tan(capture.yaw))
    slope_y += float(np.tan(capture.pitch))
    norm = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    lamp_x, lamp_y, lamp_z = capture.lamp
    towards = lamp_x * slope_x + lamp_y * slope_y
    facing = np.maximum((lamp_z - towards) * norm, 0)
    light = (1 - capture.lamp_share) * (0.55 + 0.45 * norm) + capture.lamp_share * 1.18 * facing
    mirror = np.maximum((0.9 + lamp_z - towards) * norm / 1.9, 0)
    for _ in range(4):
        mirror *= mirror
    light = 1 + inside((radius - 1) * _ROUND - 1.2, 2.0) * (light - 1)
    chin = face.y - identity.chin - 3 * capture.mouth_open - 5
    light *= 1 - 0.45 * bump(face.x, chin, 26, 5) * (1 - head)
    face.canvas[:] = face.canvas * light + identity.gloss * capture.lamp_share * mirror * head


def _draw_background(face: Patch, capture: Capture) -> None:
    """Paint two washes of colour and soft blobs of a third."""
    slope_x, slope_y, phase_x, phase_y = capture.background_waves
    wash = 0.5 + 0.5 * np.sin(slope_x * _PIXEL_X + slope_y * _PIXEL_Y + phase_x)
    blobs = 0.6 * rise(np.sin(_PIXEL_X[:1] * 0.06 + phase_y) + np.sin(_PIXEL_Y[:, :1] * 0.05 + phase_x), -0.2, 0.6)
    for plane, first, second, third in zip(face.canvas, *capture.background, strict=True):
        plane[:] = first + (second - first) * wash
        plane += blobs * (third - plane)


def _draw_body(face: Patch, identity: Identity, capture: Capture) -> None:
    """Paint the neck in the head's shade, and the collar."""
    part = face.rows(25, 200)
    neck = 0.62 * identity.head_width + 0.004 * np.maximum(part.y - 50, 0) ** 2
    part.paint(scaled(identity.skin_colour, 0.62), inside(part.side - neck) * inside(30 - part.y))
    part.paint(capture.clothes, inside(identity.chin + 13 - 0.004 * part.x**2 - part.y, 1.5))


def _draw_ears(face: Patch, identity: Identity) -> None:
    """Paint two ovals with a darker bowl, at the height of the nose."""
    part = face.rows(-5, 23)
    across = (part.side - identity.head_width - identity.ear_out + 2) / (identity.ear_size * 0.48)
    oval = np.hypot(across, (part.y - 9) / identity.ear_size)
    part.paint(scaled(identity.skin_colour, 0.86), inside((oval - 1) * 5))
    part.paint(scaled(identity.skin_colour, 0.58), 0.7 * inside((oval - 0.55) * 5, 2))


def _hair_light(face: Patch, identity: Identity, capture: Capture) -> Plane:
    """Return the brightness of the hair: wavy strands from the parting, and a shine on the crown."""
    curl, crown = identity.hair_curl, face.y + identity.crown
    run = np.arctan2(face.x - identity.hair_part * 20, crown + 25) * 26
    wave = (0.5 + 2.5 * curl) * np.sin(face.y * (0.14 + 0.30 * curl) + 0.15 * face.x)
    strands = np.sin((run + wave) * (0.5 + 0.8 * identity.hair_strands)) + 0.6 * np.sin(run * 1.9 + 0.7 * wave + 1)
    shine = bump(face.x - 9 * capture.lamp[0], crown - 6, 22, 6)
    return 0.95 + (0.05 + 0.10 * identity.hair_strands) * strands + 0.35 * shine


def _paint_hair(face: Patch, identity: Identity, light: Plane, mask: Plane) -> None:
    """Paint hair over the canvas; even black hair shows its strands."""
    for plane, value in zip(face.canvas, identity.hair_colour, strict=True):
        plane += mask * ((value + 0.03) * light - plane)


def _draw_back_hair(face: Patch, identity: Identity, capture: Capture, light: Plane) -> None:
    """Paint the hair around and behind the head, down to its length."""
    if identity.hair_volume <= 0:
        return
    radius = _radius(face, identity, capture, identity.hair_side + 0.5, identity.hair_volume)
    width = identity.head_width + identity.hair_side
    width_there = width - 0.0012 * np.maximum(face.y, 0) ** 2
    end = identity.hair_length - 7 * (face.side / width) ** 4
    hanging = inside(np.maximum(face.side - width_there, face.y - end), 2.0)
    mask = np.where(face.y > 5, hanging, inside((radius - 1) * _ROUND, 2.0))
    _paint_hair(face, identity, light * 0.72, mask)


def _draw_front_hair(face: Patch, identity: Identity, capture: Capture, light: Plane, head: Plane) -> None:
    """Paint hair on the forehead and the temples, its shadow, and long hair in front of the ears."""
    part = identity.hair_part * 0.5 * identity.head_width
    across = np.abs(face.x - part) / (identity.head_width - part * np.sign(face.x - part))
    fall = np.minimum(across * 1.06, 1.3) ** identity.hairline_power
    fringe = np.sin(face.x * 0.55 + 1) + np.sin(face.x * 0.93 + 4 * identity.hair_part)
    hairline = (identity.hairline + 6) * fall - identity.hairline + (0.3 + 0.8 * identity.hair_curl) * fringe
    radius = _radius(face, identity, capture, min(identity.hair_side, 1.5), min(identity.hair_volume, 3.0))
    mask = inside(face.y - hairline, 2.5) * inside((radius - 1) * _ROUND, 1.5)
    shadow = inside(face.y - hairline - 2, 2.5) * head * (1 - mask)
    face.canvas[:] *= 1 - 0.25 * shadow
    _paint_hair(face, identity, light, mask)
    if identity.hair_length > 12 and identity.hair_volume > 0:
        edge = identity.head_width - 1.5 - 2.5 * bump(face.x, face.y - 20, 60, 18)
        curtain = inside(edge - face.side, 2.0) * inside(face.side - identity.head_width - identity.hair_side, 2.0)
        curtain = curtain * inside(face.y - identity.hair_length + 4, 5.0) * inside(-8 - face.y, 4.0)
        _paint_hair(face, identity, light * 0.9, curtain)


def _draw_glasses(face: Patch, identity: Identity, capture: Capture, head: Plane) -> None:
    """Paint two rounded frames, a bridge and temples."""
    if capture.glasses <= 0:
        return
    outward, y = face.side - identity.eye_distance, face.y - 1.5
    rim = ((np.abs(outward) / 12.5) ** 3 + (np.abs(y) / (8 + 2.5 * capture.glasses)) ** 3) ** (1 / 3)
    frame = line((rim - 1) * 10, 0.9)
    frame = np.maximum(frame, line(y + 2, 0.9) * (outward < -11.5))
    frame = np.maximum(frame, line(y + 3, 0.8) * (outward > 11.5) * head)
    face.paint((0.85, 0.9, 0.95), 0.1 * inside((rim - 0.95) * 10))
    face.paint(capture.glasses_colour, frame)


def _draw_object(face: Patch, capture: Capture) -> None:
    """Paint an object with a smooth edge that reaches in from the border of the image."""
    if capture.object_edge is None:
        return
    angle, distance, bend = capture.object_edge
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    across, down = _PIXEL_X - SIZE / 2, _PIXEL_Y - SIZE / 2
    along = cos * down - sin * across
    face.paint(capture.object_colour, inside(distance + bend * along * along - cos * across - sin * down, 2.0))
