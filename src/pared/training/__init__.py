"""Tasks, training plans, the training loop, and checkpoints that a killed run resumes from exactly."""

from pared.training.check import check_weights as check_weights
from pared.training.check import split_batch as split_batch
from pared.training.evaluate import Split as Split
from pared.training.evaluate import evaluate as evaluate
from pared.training.evaluate import evaluating as evaluating
from pared.training.fit import Objective as Objective
from pared.training.fit import fit as fit
from pared.training.journal import Journal as Journal
from pared.training.machine import Machine as Machine
from pared.training.metric import Accuracy as Accuracy
from pared.training.metric import Metric as Metric
from pared.training.plan import Train as Train
from pared.training.processes import rank_and_world as rank_and_world
from pared.training.processes import sum_over_processes as sum_over_processes
from pared.training.samples import first_inputs as first_inputs
from pared.training.samples import first_samples as first_samples
from pared.training.task import Task as Task
from pared.training.teaching import taught_by as taught_by
