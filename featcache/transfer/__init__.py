"""Transfer: stores to files of other formats, and features that others computed into stores."""
