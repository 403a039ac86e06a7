"""The command line of featcache: the table of verbs, and the verbs that make, list and move stores."""
