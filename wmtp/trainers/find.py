"""The trainer of an algorithm: one of ours by its name, or anybody's by where it is."""

import importlib
import os
import sys

from wmtp.registry import trainer_registry
from wmtp.trainers.base import BaseWmtpTrainer
from wmtp.trainers.config import ConfigError
from wmtp.trainers.errors import worded


def find_trainer(algo: str) -> type[BaseWmtpTrainer]:
    """The class of a registered name, or of "package.module:Class", from the working folder too.

    Raises:
        ConfigError: no such name, module or class, or no trainer that could run.

        >>> find_trainer("rho1-wmtp").__name__
        'Rho1WmtpTrainer'
        >>> find_trainer("rho2")
        Traceback (most recent call last):
            ...
        wmtp.trainers.config.ConfigError: 'rho2' is not one of mtp-baseline, critic-wmtp, rho1-wmtp, nor a package.module:Class
    """  # noqa: E501  (a message is one line)
    module_name, colon, class_name = algo.partition(":")
    if not colon:
        names = trainer_registry.names()
        if algo not in names:
            listed = ", ".join(names)
            raise ConfigError(f"{algo!r} is not one of {listed}, nor a package.module:Class")
        return trainer_registry.get(algo)
    found = getattr(_module(module_name, algo), class_name, None)
    if not (isinstance(found, type) and issubclass(found, BaseWmtpTrainer)):
        raise ConfigError(f"{algo}: {module_name} has no trainer {class_name}, a BaseWmtpTrainer")
    if found.__abstractmethods__:
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"{algo} is abstract: it lacks {missing}")
    return found


def _module(name: str, algo: str) -> object:
    if not all(name.split(".")):  # a module's place is not known here
        raise ConfigError(f"{algo}: {name!r} is no module: package.module:Class is wanted")
    folder = os.getcwd()
    if folder not in sys.path:  # an installed command does not look there
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the user's code does
        raise ConfigError(f"{algo}: cannot import {name} ({worded(error)})") from error
