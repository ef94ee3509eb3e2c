"""The verbs. No logic: options become a call, results become text, outcomes become exit codes."""

from .app import app as app
from .app import out as out
from .app import say as say
from .ending import main as main
from .ending import run as run
