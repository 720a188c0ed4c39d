"""Policies: from names and files to models that denoise, and back to files."""

import warnings

import transformers.utils.logging as transformers_logging

# A stage that loads a model in every round would fill the terminal; errors still show.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
# peft asks by the old name; nothing that a user can mend.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
