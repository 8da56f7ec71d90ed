"""The report stage: one run directory to one HTML file that opens offline. J.4. Reads everything, changes nothing."""
