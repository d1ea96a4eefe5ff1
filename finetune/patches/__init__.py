"""Every patch of another library, a module for each library, and the table that says when each may go."""
