"""What happens to stores after they are written: verified, repaired, deleted, renamed, relabelled."""
