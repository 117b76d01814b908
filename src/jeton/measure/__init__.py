"""What a reduction costs and what it keeps: data, accuracy, time, comparison, report and pictures; and systems that measure
tokens or models: `lastde` tells machine-written text, `reagent` what a prediction rests on; `patch-scaling` asks whether
smaller patches help."""

SYSTEMS = ("lastde", "patch_scaling", "reagent")
