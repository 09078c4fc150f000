"""Tables, figures and one HTML page of runs, comparisons and sweeps."""
