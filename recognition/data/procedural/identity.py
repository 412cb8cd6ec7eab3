"""Parameters of a procedural face: those of an identity, and those of one photograph of it.

Lengths are pixels of the 112 x 112 image, angles are radians, colours RGB in 0..1; all others run over 0..1 or -1..1.
The origin is the middle between the eyes, x to the right, y down.
"""

from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]
Spot = tuple[float, float, float, float]
"""Centre x and y, radius, darkness."""

_IDENTITY, _CAPTURE = 1, 2


@dataclass(frozen=True)
class Identity:
    """Parameters of one identity. Every image of it is drawn from these and a `Capture`."""

    # Skull: half widths, distances above and below the eyes, and how square the outline is.
    head_width: float
    crown: float
    chin: float
    jaw_power: float
    jaw_taper: float
    brow_taper: float
    chin_boss: float
    cheekbone: float
    hollow: float
    asymmetry: float
    # Eyes.
    eye_distance: float
    eye_width: float
    eye_height: float
    eye_tilt: float
    eye_skew: float
    iris: float
    iris_colour: Colour
    socket: float
    lid_fold: float
    lashes: float
    bags: float
    # Brows.
    brow_height: float
    brow_length: float
    brow_thickness: float
    brow_arch: float
    brow_tilt: float
    brow_density: float
    # Nose.
    nose_length: float
    nose_width: float
    nose_bridge: float
    nose_height: float
    nose_tip: float
    nose_hook: float
    # Mouth.
    mouth_height: float
    mouth_width: float
    upper_lip: float
    lower_lip: float
    cupid_bow: float
    mouth_corner: float
    lip_colour: Colour
    # Ears.
    ear_size: float
    ear_out: float
    # Hair.
    hair_colour: Colour
    hair_volume: float
    hair_side: float
    hair_length: float
    hairline: float
    hairline_power: float
    hair_part: float
    hair_curl: float
    hair_strands: float
    beard: float
    moustache: float
    # Skin.
    skin_colour: Colour
    blush: float
    gloss: float
    folds: float
    # Marks: freckles and spots.
    freckles: float
    freckle_phase: tuple[float, float, float]
    spots: tuple[Spot, ...]


@dataclass(frozen=True)
class Capture:
    """Parameters of one photograph: pose, expression, light, background, occlusion and camera."""

    # Pose: turns, and what remains of an imperfect alignment.
    yaw: float
    pitch: float
    roll: float
    zoom: float
    shift: tuple[float, float]
    # Expression.
    smile: float
    mouth_open: float
    eyes_open: float
    brow_raise: float
    gaze: tuple[float, float]
    # Light: direction to the lamp, its share of the light, colour and exposure.
    lamp: tuple[float, float, float]
    lamp_share: float
    tint: Colour
    exposure: float
    gamma: float
    saturation: float
    # Background and clothes.
    background: tuple[Colour, Colour, Colour]
    background_waves: tuple[float, float, float, float]
    clothes: Colour
    # Occlusion: glasses, and something in front of a corner of the image (x, y, angle, half width).
    glasses: float
    glasses_colour: Colour
    object_edge: tuple[float, float, float] | None
    object_colour: Colour
    # Camera.
    blur: float
    noise: float
    quality: int
    noise_seed: int


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def _ramp(colours: tuple[Colour, ...], position: float) -> Colour:
    """Interpolate the colour at `position` in 0..1 along evenly spaced stops."""
    place = min(max(position, 0.0), 1.0) * (len(colours) - 1)
    stop = min(int(place), len(colours) - 2)
    return _mix(colours[stop], colours[stop + 1], place - stop)


_SKIN = ((0.91, 0.77, 0.69), (0.85, 0.67, 0.56), (0.72, 0.53, 0.41), (0.53, 0.36, 0.27), (0.33, 0.22, 0.17))
_HAIR = ((0.05, 0.04, 0.045), (0.14, 0.085, 0.06), (0.30, 0.17, 0.10), (0.52, 0.34, 0.18), (0.80, 0.64, 0.38))
_IRIS = ((0.10, 0.06, 0.04), (0.26, 0.15, 0.07), (0.36, 0.33, 0.14), (0.25, 0.42, 0.30), (0.28, 0.46, 0.64))


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, *key))))


def identity_parameters(seed: int, identity: int) -> Identity:
    """Draw the identity's parameters, a function of (seed, identity) alone; both are non-negative integers."""
    generator = _generator(seed, _IDENTITY, identity)

    def between(low: float, high: float, lean: float = 0.0) -> float:
        # `lean` in -1..1 pulls towards one end, so that the traits of a face agree with each other.
        share = float(generator.random())
        return low + (high - low) * min(max(share + 0.28 * lean * (1 - abs(2 * share - 1)), 0.0), 1.0)

    build = between(-1.0, 1.0)
    age = between(0.0, 1.0)
    masculine = max(0.0, build)
    pigment = between(0.0, 1.0)
    skin = _ramp(_SKIN, pigment)
    skin = _mix(skin, (skin[0], skin[1] * 0.86, skin[2] * 0.84), between(0.0, 1.0))
    skin = _mix(skin, (skin[0] * 0.98, skin[1] * 1.02, skin[2] * 0.86), between(0.0, 1.0))
    fairness = between(0.0, 1.0) * (1.1 - 0.6 * pigment)
    hair = _ramp(_HAIR, fairness)
    hair = _mix(
        hair, (hair[0] * 1.5 + 0.08, hair[1] * 0.85, hair[2] * 0.5), between(0.0, 1.0) ** 2 * (1 - 0.4 * pigment)
    )
    grey = between(0.45, 0.75)
    hair = _mix(hair, (grey, grey, grey * 1.02), max(0.0, between(-2.2, 1.1, 2 * age - 1)) ** 0.5 * age)
    bald = max(0.0, between(-3.2, 0.9, build)) * masculine

    def spot() -> Spot:
        x, y = between(-30, 30), between(-26, 46)
        return x, y, between(0.9, 1.9), max(0.0, between(-0.9, 0.9))

    return Identity(
        head_width=between(34.0, 44.5, 0.5 * build),
        crown=between(45, 53),
        chin=between(50, 65, 0.5 * build),
        jaw_power=between(1.9, 3.6, build),
        jaw_taper=between(0.0, 0.26, -build),
        brow_taper=between(0.0, 0.16),
        chin_boss=between(-0.5, 3.0, build),
        cheekbone=between(0.0, 3.2),
        hollow=between(0.0, 2.4),
        asymmetry=between(-0.035, 0.035),
        eye_distance=between(15.6, 20.2),
        eye_width=between(7.6, 10.4, -0.3 * build),
        eye_height=between(3.2, 7.0, -0.5 * build),
        eye_tilt=between(-0.20, 0.30, -0.5 * build),
        eye_skew=between(-0.35, 0.35),
        iris=between(3.2, 4.4),
        iris_colour=_ramp(_IRIS, between(0.0, 1.0) * (1.1 - 0.8 * pigment)),
        socket=between(0.5, 3.4, 0.4 * build),
        lid_fold=between(0.0, 1.0),
        lashes=between(0.25, 1.0, -build),
        bags=between(0.0, 0.7, 2 * age - 1),
        brow_height=between(7.8, 14.0, -0.6 * build),
        brow_length=between(8.5, 13.0),
        brow_thickness=between(0.8, 3.2, build),
        brow_arch=between(-0.6, 3.6, -build),
        brow_tilt=between(-0.24, 0.13),
        brow_density=between(0.35, 1.0),
        nose_length=between(15.5, 26.0, 0.3 * build),
        nose_width=between(5.2, 11.0),
        nose_bridge=between(2.4, 4.6),
        nose_height=between(6.0, 13.0, 0.3 * build),
        nose_tip=between(3.0, 5.4),
        nose_hook=between(-2.0, 2.4),
        mouth_height=between(0.40, 0.55),
        mouth_width=between(10.0, 19.0),
        upper_lip=between(1.2, 4.6, -0.6 * build),
        lower_lip=between(2.0, 6.0, -0.6 * build),
        cupid_bow=between(0.0, 0.55),
        mouth_corner=between(-1.6, 1.6),
        lip_colour=_mix((skin[0] * 0.86, skin[1] * 0.68, skin[2] * 0.68), (0.68, 0.20, 0.24), between(0, 0.75, -build)),
        ear_size=between(7.5, 12.5),
        ear_out=between(-1.5, 4.5),
        hair_colour=hair,
        hair_volume=between(2.0, 11.0, -0.4 * build) * (1 - min(bald, 1.0)),
        hair_side=between(0.0, 9.0, -0.8 * build) * (1 - 0.7 * min(bald, 1.0)),
        hair_length=between(-6.0, 75.0, -2.2 * build),
        hairline=between(17.0, 36.0, 0.6 * build) + 24.0 * bald,
        hairline_power=between(1.4, 5.0),
        hair_part=between(-0.6, 0.6),
        hair_curl=between(0.0, 1.0),
        hair_strands=between(0.35, 0.95),
        beard=max(0.0, between(-1.2, 1.0, build)) * masculine**0.5,
        moustache=max(0.0, between(-1.0, 1.0, build)) * masculine**0.5,
        skin_colour=skin,
        blush=between(0.0, 0.55),
        gloss=between(0.03, 0.22),
        folds=between(0.0, 0.8, 2 * age - 1),
        freckles=max(0.0, between(-1.4, 1.0)) * (1 - 0.8 * pigment),
        freckle_phase=(between(0, 6.3), between(0, 6.3), between(0.85, 1.2)),
        spots=tuple(spot() for _ in range(4)),
    )


def capture_parameters(seed: int, identity: int, image: int) -> Capture:
    """Draw the parameters of image `image` of an identity, a function of (seed, identity, image) alone."""
    generator = _generator(seed, _CAPTURE, identity, image)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(generator.random())

    def normal(spread: float) -> float:
        return spread * min(max(float(generator.standard_normal()), -2.2), 2.2)

    def colour(low: float = 0.05, high: float = 0.9) -> Colour:
        base, strength = between(low, high), between(0.0, 0.6)
        red, green, blue = (base * (1 + strength * between(-1, 1)) for _ in range(3))
        return red, green, blue

    side, height = between(-1.3, 1.3), between(-0.9, 0.5)
    length = (side**2 + height**2 + 1) ** 0.5
    warmth = normal(0.05)
    smile = between(-0.35, 1.0)
    edge = None
    if between(0, 1) < 0.25:
        # A straight-edged object that reaches in from the border: angle of its normal, distance, roundness.
        edge = (between(0, 2 * np.pi), between(36, 54), between(0.0, 0.02))
    return Capture(
        yaw=normal(0.18),
        pitch=normal(0.10),
        roll=normal(0.055),
        zoom=1 + normal(0.03),
        shift=(normal(1.4), normal(1.4)),
        smile=smile,
        mouth_open=max(0.0, between(-1.5, 1.0)) * (0.4 + 0.6 * max(smile, 0.0)),
        eyes_open=1 + normal(0.10) - 0.12 * max(smile, 0.0),
        brow_raise=normal(0.7),
        gaze=(normal(0.8), normal(0.35)),
        lamp=(side / length, height / length, 1 / length),
        lamp_share=between(0.2, 0.75),
        tint=(1 + warmth, 1 + normal(0.02), 1 - warmth),
        exposure=float(np.exp(normal(0.14))),
        gamma=float(np.exp(normal(0.10))),
        saturation=0.0 if between(0, 1) < 0.015 else between(0.75, 1.15),
        background=(colour(), colour(), colour()),
        background_waves=(normal(0.05), normal(0.05), between(0, 6.3), between(0, 6.3)),
        clothes=colour(0.03, 0.8),
        glasses=between(0.3, 1.0) if between(0, 1) < 0.10 else 0.0,
        glasses_colour=colour(0.02, 0.35),
        object_edge=edge,
        object_colour=colour(),
        blur=max(0.0, between(-0.6, 0.9)),
        noise=between(0.0, 0.022),
        quality=int(between(55, 96)),
        noise_seed=int(generator.integers(2**32)),
    )
