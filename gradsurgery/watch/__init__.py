"""What happened over a run, what would happen without training, what each engine would cost; and their pictures."""
