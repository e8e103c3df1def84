"""Recipes: read and written as YAML, carried out with checkpoints, measured files and baselines."""

from pared.recipe import yaml as yaml
from pared.recipe.budget import Budget as Budget
from pared.recipe.methods import METHODS as METHODS
from pared.recipe.methods import method_name as method_name
from pared.recipe.methods import settings as settings
from pared.recipe.result import Result as Result
from pared.recipe.result import Step as Step
from pared.recipe.runner import compress as compress
from pared.recipe.yaml import dumps as dumps
from pared.recipe.yaml import loads as loads
from pared.recipe.yaml import read as read
from pared.recipe.yaml import write as write
