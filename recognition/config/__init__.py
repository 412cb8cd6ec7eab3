"""The description of a run: sections of settings, read from TOML files and `section.key=value` overrides."""

from recognition.config.backbone import Backbone as Backbone
from recognition.config.base import ConfigError as ConfigError
from recognition.config.command import command_line as command_line
from recognition.config.data import Augment as Augment
from recognition.config.data import Data as Data
from recognition.config.data import Faces as Faces
from recognition.config.head import Head as Head
from recognition.config.load import load as load
from recognition.config.losses import *  # noqa: F403 - a loss is listed nowhere
from recognition.config.optimizers import SGD as SGD
from recognition.config.optimizers import AdamW as AdamW
from recognition.config.optimizers import Optimizer as Optimizer
from recognition.config.sections import Checkpoint as Checkpoint
from recognition.config.sections import Config as Config
from recognition.config.sections import Distributed as Distributed
from recognition.config.sections import Evaluation as Evaluation
from recognition.config.sections import Export as Export
from recognition.config.sections import Run as Run
from recognition.config.sections import Tracking as Tracking
from recognition.config.sections import Training as Training
from recognition.errors import UserError as UserError
