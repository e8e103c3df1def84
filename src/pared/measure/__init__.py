"""Measuring: latency, size and accuracy, all read off the deployed file."""

from pared.measure.latency import Latency as Latency
from pared.measure.latency import latency as latency
from pared.measure.layers import layer_times as layer_times
from pared.measure.metric import file_metric as file_metric
from pared.measure.metric import sample_inputs as sample_inputs
from pared.measure.profile import AdaptsToInput as AdaptsToInput
from pared.measure.profile import Metric as Metric
from pared.measure.profile import Profile as Profile
from pared.measure.profile import packed as packed
from pared.measure.profile import profile as profile
