"""Optional features of a run: a folder for each, and one list of them.

registry.py    the list: settings, parts in the order of their calls, checks

budget/        keeps to a budget of FFN experts per token, step by step
callbacks/     a user's objects that get the events of a run
data_stages/   stages of the data: the current one, and when the next begins
distillation/  a teacher's forward pass, and the loss that compares both models
guard/         the routing guard: shifts of data and routers, and what is done about them
mtp/           the loss of multi-token prediction (MTP)
profile/       profiles of single steps
router_health/ the router health of a step, from every rank's logits
routes/        records, replays and traces the experts that tokens take
static_rows/   fixed numbers of rows for FFN experts; steps that overflow run again
tasks/         evaluates the running model on tasks of lm-eval
telemetry/     power, utilisation, memory and links of all nodes
tokens/        FFN experts by class of tokens; loss and experts by data source
validation/    validation losses

`settings.py` of a folder has its settings with their rules, and imports no torch. `part.py` has its
part, by the protocol of `training.part`.
"""

# First, because the configuration is made of the settings of all features.
import moepp_megatron.config  # noqa: F401
