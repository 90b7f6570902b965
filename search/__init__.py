"""The application: studies over real quantizations, their processes, their record and the command line `hyq-search`.

    search.study, search.study_file   what a study is, and its YAML file
    search.runner, search.slots       one runner per study, one torchrun group per slot
    search.worker, search.leader      the ranks of a slot; rank 0 asks Optuna and tells it
    search.objective, search.scoring  one trial from its config to its values and constraints
    search.storage, search.tracking   Optuna's database (the truth) and MLflow's (the record)
    search.report, search.commands    pictures, tables, JSON answers; the commands

Nothing imports this package.
"""

DISTRIBUTION = "hyq-search"
