"""The paper's experiments at a size that this machine trains: runs, what they are measured by, one record, one page."""
