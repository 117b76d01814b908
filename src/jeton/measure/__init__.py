"""What a reduction costs and what it keeps: data, accuracy, time, comparison, report and pictures."""
