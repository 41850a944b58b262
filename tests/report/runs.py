"""Records of runs that never were: every curve and figure known."""

import json

DIAGNOSTICS = {
    "skipped_steps": 0,
    "rows": 4,
    "kappa": 1.1,
    "condition": 30.0,
    "directions": 3.2,
    "angle_update_gradient": 70.0,
    "ratio_update_gradient": 40.0,
    "scale_q25": 3.0,
    "scale_q50": 30.0,
    "scale_q75": 300.0,
    "update_rms_all": 0.5,
    "update_rms_matrix": 0.6,
    "relative_step": 1e-4,
    "compression_error": 0.8,
    "error_mass": 2.0,
    "weight_newest": 0.4,
    "weight_age_0": 0.4,
    "weight_age_1": 0.35,
    "weight_age_2_3": 0.25,
    "cosine_update_row": 0.5,
}


def logs(steps=40, every=5, end=0.5, evaluations=(1.0, 0.8), **diagnostics):
    """Loss from 2 to `end`; an evaluation at even parts of the way."""
    history = []
    for step in range(every, steps + 1, every):
        log = {"loss": 2 + (end - 2) * step / steps, "grad_norm": 0.5, "learning_rate": 1e-4, "step": step}
        history.append(
            log | {f"efcp_{name}": value for name, value in diagnostics.items()} | ({"efcp_step": step} if diagnostics else {})
        )
    for i, value in enumerate(evaluations, 1):
        history.append(
            {"eval_loss": value, "eval_runtime": 0.5, "eval_model_preparation_time": 0.1, "step": steps * i // len(evaluations)}
        )
    return history


def record(folder, history, name="efcp_lowrank_mfac", seconds=2.0, **changed):
    """Write an efcp_run.json; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    moments = {"exp_avg": 4000, "exp_avg_sq": 4000, "step": 8}
    optimizer = {
        "name": name,
        "options": {"rank": "4", "window_size": "8"},
        "memory": {"window": 2500, "error": 500},
        "adamw": moments,
    }
    content = {
        "version": 1,
        "optimizer": optimizer,
        "model": {"class": "Bert", "name": "tiny", "parameters": 1000, "trained": 1000},
        "arguments": {"learning_rate": "0.0001", "max_grad_norm": "1.0"},
        "environment": {"cpu": "a processor", "torch": "2"},
        "times": [(log["step"], log["step"] * seconds) for log in history if "loss" in log],
        "log_history": history,
        "finished": True,
    }
    (folder / "efcp_run.json").write_text(json.dumps(content | changed))
    return folder
