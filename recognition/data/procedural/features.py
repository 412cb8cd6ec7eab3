"""Features of a procedural face: skin and marks, beard, nostrils, eyes, brows and mouth.

Each function paints on a patch; it depends on the identity, and on the capture for features that move.
"""

import numpy as np

from recognition.data.procedural.identity import Capture, Identity
from recognition.data.procedural.shapes import Patch, Plane, bump, inside, line, rise, scaled


def mouth_y(identity: Identity) -> float:
    """Return the height of the mouth, between the nose and the chin."""
    return identity.nose_length + identity.mouth_height * (identity.chin - identity.nose_length)


def draw_skin(patch: Patch, identity: Identity, head: Plane) -> None:
    """Paint skin, blush, freckles and spots. `head` is the mask of the head."""
    x, y, side = patch.x, patch.y, patch.side
    skin = identity.skin_colour
    red = (skin[0] * 0.98, skin[1] * 0.74, skin[2] * 0.74)
    patch.paint(skin, head)
    patch.paint(red, identity.blush * bump(side - 22, y - 20, 8, 6))
    patch.paint(red, (0.15 + 0.4 * identity.blush) * bump(x, y - identity.nose_length, 5, 4))
    if identity.freckles > 0:
        area = patch.rows(-2, 32)
        x, y = area.x, area.y
        phase_x, phase_y, pace = identity.freckle_phase
        dots = np.sin(1.5 * pace * x + phase_x + 1.7 * np.sin(0.9 * y))
        dots *= np.sin(1.7 * pace * y + phase_y + np.sin(0.8 * x))
        colour = (skin[0] * 0.66, skin[1] * 0.50, skin[2] * 0.42)
        area.paint(colour, identity.freckles * bump(area.side - 13, y - 15, 13, 8) * rise(dots, 0.25, 0.9))
    for spot_x, spot_y, radius, darkness in identity.spots:
        if darkness > 0:
            near = patch.rows(spot_y - 2 * radius, spot_y + 2 * radius)
            spot = bump(near.x - spot_x, near.y - spot_y, radius, radius)
            near.paint(scaled(skin, 0.32), min(1.6 * darkness, 1.0) * spot)


def draw_beard(patch: Patch, identity: Identity, head: Plane) -> None:
    """Paint stubble or a beard along the jaw and the chin, and a moustache."""
    if identity.beard + identity.moustache <= 0:
        return
    x, y, side = patch.x, patch.y, patch.side
    grain = 0.8 + 0.2 * np.sin(2.1 * x + np.sin(1.3 * y)) * np.sin(1.9 * y + np.sin(1.7 * x))
    jaw = rise(side / identity.head_width + 0.9 * (y - identity.nose_length) / identity.chin, 0.45, 0.85)
    jaw = jaw * rise(y, 12, 30) * (1 - 0.8 * bump(side - 16, y - 17, 9, 8))
    chin = rise(y, mouth_y(identity) + 3, mouth_y(identity) + 8) * rise(side, 24, 12)
    patch.paint(identity.hair_colour, 0.92 * identity.beard**0.6 * grain * np.maximum(jaw, chin) * head)
    lip = (identity.nose_length + 3 + mouth_y(identity)) / 2 + 1 + 0.02 * side * side
    patch.paint(identity.hair_colour, 0.95 * identity.moustache**0.6 * grain * bump(side - 5, y - lip, 6.5, 2.6))


def draw_nostrils(face: Patch, identity: Identity) -> None:
    """Paint the nostrils, the creases of the wings and the shade under the tip."""
    patch = face.rows(identity.nose_length - 8, identity.nose_length + 8)
    width, skin = identity.nose_width, identity.skin_colour
    x, y = patch.side - width * 0.5, patch.y - identity.nose_length - 2.2
    patch.paint(scaled(skin, 0.55), 0.5 * bump(patch.x, y - 0.6, width * 0.8, 1.2))
    patch.paint(scaled(skin, 0.22), 0.75 * bump(x, y + 0.25 * x, width * 0.2, 0.95))
    crease = np.abs(np.hypot(patch.side - width * 0.72, y + 2.2) - 3.4)
    wing = np.maximum(1 - crease / 1.1, 0) * rise(patch.side, width * 0.75, width * 1.05)
    patch.paint(scaled(skin, 0.5), 0.55 * wing * rise(y, -6, -2))


def draw_eyes(face: Patch, identity: Identity, capture: Capture) -> None:
    """Paint eyeball, iris, pupil and glint between two lids; lashes, and the fold above them."""
    patch = face.rows(-12, 11)
    skin = identity.skin_colour
    outward = patch.side - identity.eye_distance
    s = outward / identity.eye_width
    y = patch.y + identity.eye_tilt * outward
    arch = np.maximum(1 - s * s, 0)
    opening = identity.eye_height * capture.eyes_open
    upper = -0.68 * opening * arch**0.75 * (1 + identity.eye_skew * s)
    lower = (0.42 - 0.06 * max(capture.smile, 0)) * opening * arch * (1 + 0.3 * s)
    gap = inside(np.maximum(upper - y, y - lower), 1.1) * (arch > 0)
    patch.paint((0.86, 0.84, 0.83), gap)
    look_x = patch.x - np.copysign(identity.eye_distance, patch.x) - capture.gaze[0]
    look_y = patch.y + 0.35 - capture.gaze[1]
    radius = np.hypot(look_x, look_y)
    patch.paint(scaled(identity.iris_colour, 0.45), gap * inside(radius - identity.iris * 0.94))
    patch.paint(scaled(identity.iris_colour, 1.15), gap * inside(radius - identity.iris * 0.77, 1.6))
    patch.paint((0.03, 0.025, 0.03), gap * inside(radius - identity.iris * 0.40))
    patch.paint((0.12, 0.09, 0.09), 0.55 * gap * rise(y - upper, 2.4, 0.0))
    glint = np.hypot(look_x - np.copysign(1.1, capture.lamp[0]), look_y + 1.1)
    patch.paint((1.0, 1.0, 1.0), 0.9 * gap * inside(glint - 0.75))
    near = rise(np.abs(s), 1.18, 0.95)
    patch.paint(scaled(skin, 0.5), 0.45 * near * line(y - lower - 0.3, 0.3))
    patch.paint(scaled(skin, 0.55), 0.65 * identity.lid_fold * near * line(y - upper + 1.9 + identity.lid_fold, 0.3))
    lashes = line(y - upper + 0.25, 0.35 + 0.55 * identity.lashes)
    patch.paint(scaled(skin, 0.22), (0.45 + 0.5 * identity.lashes) * near * lashes)


def draw_brows(face: Patch, identity: Identity, capture: Capture) -> None:
    """Paint two tapering arcs with a trace of hairs."""
    middle = -identity.brow_height - capture.brow_raise
    patch = face.rows(middle - 10, middle + 8)
    s = (patch.side - identity.eye_distance - 0.5) / identity.brow_length
    centre = middle - identity.brow_arch * (1 - (s - 0.15) ** 2) - identity.brow_tilt * identity.brow_length * s
    thickness = identity.brow_thickness * (1.05 - 0.55 * rise(s, -0.3, 1.1))
    mask = inside(np.abs(patch.y - centre) - thickness, 1.5) * rise(np.abs(s), 1.05, 0.8)
    hairs = 0.9 + 0.1 * np.sin(1.9 * patch.side + 1.3 * patch.y)
    patch.paint(scaled(identity.hair_colour, 0.62), identity.brow_density * mask * hairs)


def draw_mouth(face: Patch, identity: Identity, capture: Capture) -> None:
    """Paint two lips about a line that a smile bends, with teeth and dark between them in an open mouth."""
    middle = mouth_y(identity)
    patch = face.rows(middle - 10, middle + 14)
    lip = identity.lip_colour
    s = patch.x / (identity.mouth_width * (1 + 0.10 * capture.smile))
    arch = np.maximum(1 - s * s, 0)
    round_arch = np.sqrt(arch)
    y = patch.y - middle + (0.7 * identity.mouth_corner + 2.2 * capture.smile) * (s * s - 0.25)
    above = -1.25 * capture.mouth_open * arch
    below = 3.75 * capture.mouth_open * arch
    bow = 1 - identity.cupid_bow * bump(s, s, 0.2, 0.2) + 0.12 * bump(np.abs(s) - 0.25, s * 0, 0.2, 1)
    top = above - identity.upper_lip * (1 - 0.15 * capture.smile) * arch * bow
    bottom = below + identity.lower_lip * 0.5 * (arch + round_arch)
    lips = inside(np.maximum(top - y, y - bottom), 1.6) * (arch > 0)
    patch.paint(scaled(lip, 0.86), lips)
    patch.paint(scaled(lip, 1.10), lips * inside(below - y, 1.5))
    patch.paint(scaled(lip, 1.45), 0.4 * bump(patch.x, y - below - identity.lower_lip * 0.45, 5, 1))
    between = np.maximum(above - y, y - below)
    patch.paint(scaled(lip, 0.22), 0.85 * inside(between - 0.35, 1.1) * (arch > 0))
    if capture.mouth_open > 0.15:
        teeth = inside(np.maximum(above - y, y - 0.4 * below) + 0.3) * rise(np.abs(s), 0.85, 0.6)
        patch.paint((0.88, 0.86, 0.82), 0.95 * teeth)
