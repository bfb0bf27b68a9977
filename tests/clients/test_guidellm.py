"""guidellm drives the server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from processes import PATIENCE_S
from serving import Running
